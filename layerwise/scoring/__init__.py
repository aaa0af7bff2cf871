"""Scoring of pruned models: perplexity, accuracy, reconstruction errors, and ATP's theorems."""
