"""Lane groups on other processes or in a work pool."""
