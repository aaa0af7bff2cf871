"""Text that the dense model writes itself, to calibrate on."""
