"""Compressed checkpoints: file format, writing, reading."""
