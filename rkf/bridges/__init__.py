"""Bridges to libraries that people already use: each module is imported on its own and needs the library it names."""
