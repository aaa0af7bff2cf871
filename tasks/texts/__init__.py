"""Texts for calibration, selection and test."""
