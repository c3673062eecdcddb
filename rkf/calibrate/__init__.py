"""Calibration: its text, and statistics of the model on it, computed by a numpy interpreter of programs."""
