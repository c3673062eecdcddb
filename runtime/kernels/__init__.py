"""Everything that Numba compiles. Nothing here is imported when the compiled objects are in the cache (runtime/jit.py).

The cache key is the bytes of the files in this folder and of runtime/structs.py, and the CPU.
"""
