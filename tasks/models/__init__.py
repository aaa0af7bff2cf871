"""Checkpoints: their index, tensors and tokenizer, and models built from them."""
