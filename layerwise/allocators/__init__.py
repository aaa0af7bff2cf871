"""Allocators: sparsity of every decoder layer or linear, for one overall sparsity."""
