"""Prefect flows and the command line: the entry points of layerwise. Read these first."""

from layerwise.flows.orchestration.embedded_server import prefer_quiet_prefect

# Prefect reads its settings when it is imported, and any module of this package may import it first.
prefer_quiet_prefect()
