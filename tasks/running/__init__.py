"""Execution of tasks: threads, progress, stopping."""
