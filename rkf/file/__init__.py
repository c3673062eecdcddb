"""Whole files: read, written, verified, compared, packed."""
