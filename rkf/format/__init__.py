"""The bytes of a file: constants, structure, planes, hashes."""
