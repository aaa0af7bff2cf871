"""Figures of the report and of the theory page."""
