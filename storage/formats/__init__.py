"""Formats of an artifact's files: tensors, tables, documents."""
