"""Prefect flows and the command line: the entry points. Read these first."""

from layerwise.flows.orchestration.embedded_server import prefer_quiet_prefect

# Here and nowhere later: Prefect reads its settings when it is imported, which every flow's first line does.
prefer_quiet_prefect()
