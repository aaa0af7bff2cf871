"""Fan-out: parts of a search run in other processes, on this machine or by the workers of a Prefect work pool."""
