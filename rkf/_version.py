"""The version, in one place: pyproject.toml, the provenance in every file and the JIT cache key read it here."""

__version__ = "0.1.0"
