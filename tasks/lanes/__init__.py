"""Groups of lanes: inputs, state, statistics."""
