"""Everything that Numba compiles. Nothing here is imported when the compiled objects are in the cache (runtime/jit.py).

The cache is keyed by the bytes of the files in this folder, of runtime/structs.py, and by the CPU.
"""
