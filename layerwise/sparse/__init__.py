"""Sparse inference on CPUs: packed weights, a native kernel, linears that use it, and speed measurements."""
