"""Groups of lanes: their inputs, their pass through the model, and which lanes share a group."""
