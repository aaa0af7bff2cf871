"""Checkpoints: index, tensors, and models built from them."""
