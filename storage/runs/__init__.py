"""Logs of runs in the store."""
