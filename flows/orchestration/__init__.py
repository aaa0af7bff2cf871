"""Prefect's server, its artifacts, and cancellation."""
