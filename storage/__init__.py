"""Bytes: keys, the artifact store, tensors and tables, on any fsspec file system."""
