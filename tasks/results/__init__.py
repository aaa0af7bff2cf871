"""Facts about a finished search, read from its artifacts."""
