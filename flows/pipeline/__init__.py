"""Stages of a search: which there are, which exist, and which would run."""
