"""Prefect flows, their settings, and the command line. Start reading here."""

from layerwise.flows.orchestration.embedded_server import prefer_quiet_prefect

# Must run before the first import of Prefect, which reads its settings when it is imported.
prefer_quiet_prefect()
