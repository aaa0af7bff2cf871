"""Prefect flows and the command line: the entry points. Read these first."""
