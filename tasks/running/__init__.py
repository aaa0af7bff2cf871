"""Execution of tasks: settings of the machine, progress, layer boundaries, SIGTERM, printable text."""
