"""Whole files: reading, writing, verifying, comparing and packing them."""
