"""Stages of a search as one graph, which is built, looked up or planned; and the result of a search."""
