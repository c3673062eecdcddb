"""What a model is: its configuration, its tables of angles."""
