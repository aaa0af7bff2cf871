"""Calibration: token windows, and statistics of the inputs of linears over them."""
