"""The bytes of a file: constants, structure, planes, hashes. Knows no file and no model."""
