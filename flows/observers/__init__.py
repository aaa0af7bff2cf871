"""Observers of a running search: the time left, and tracking services."""
