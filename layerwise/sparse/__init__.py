"""Pruned models on CPUs, faster for their zeros: a small native kernel, linears that use it, and what they gain."""
