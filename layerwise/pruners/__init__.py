"""Pruners: selection of the weights to remove from a linear, and correction of the others."""
