"""Pruners: which weights of a linear are removed."""
