"""Whose text a conversion is suited to, and what a model in numpy says of it."""
