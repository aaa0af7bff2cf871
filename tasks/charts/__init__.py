"""Figures of the report and the theory page."""
