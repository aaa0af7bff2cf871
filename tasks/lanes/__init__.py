"""Groups of lanes: their inputs, their pass through the model, and their membership in groups."""
