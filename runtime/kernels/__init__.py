"""Everything that Numba compiles. Nothing here is imported when the compiled objects are there (runtime/objects.py).

The bytes of the files in this folder and of runtime/structs.py are part of the key under which an object is stored.
"""
