"""Statistics of the inputs of linears over the calibration windows."""
