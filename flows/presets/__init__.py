"""Presets of a comparison: the settings of published experiments, and the numbers that were published for them."""
