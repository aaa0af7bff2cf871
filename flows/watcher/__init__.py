"""Watcher: a flow that starts a search for every new checkpoint, on a schedule."""
