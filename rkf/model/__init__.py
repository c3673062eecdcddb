"""What a model computes: programs, their ops, and the metadata around them."""
