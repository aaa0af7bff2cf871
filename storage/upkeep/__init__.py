"""Maintenance of a store: garbage collection, verification, setting damaged artifacts aside."""
