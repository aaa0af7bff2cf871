"""Decoder layers of a model, run one at a time."""
