"""Allocators: target sparsity of every decoder layer."""
