"""Texts for calibration, selection and test: the corpora they are read from, and the part for each role."""
