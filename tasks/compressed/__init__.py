"""Compressed checkpoints: their file format, and how they are read."""
