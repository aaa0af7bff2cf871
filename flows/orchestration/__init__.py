"""Prefect's server, cancellation of flow runs, and the processes that end together."""
