"""Fan-out: parts of a search run in other processes: on this machine, by workers of the store, or of a Prefect work pool."""
