"""Perplexity, accuracy, reconstruction errors and the paper's theory."""
