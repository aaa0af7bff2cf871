"""Models without their weights, and their decoder layers run one at a time."""
