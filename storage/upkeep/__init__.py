"""Maintenance of a store: inventory, garbage collection, verification, signs of life."""
