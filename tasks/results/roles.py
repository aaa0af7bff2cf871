"""Roles that the artifacts of a search have in its result, and names of facts that several modules read."""

SELECT, EXPORT, EVALUATE = "select", "export", "evaluate"
# The result proper: `layerwise show` reads these, and `layerwise gc --results-only` keeps them.
RESULTS = (SELECT, EXPORT, EVALUATE)
RECOVERED_UNIFORM, RECOVERED_BEST = "recovered uniform", "recovered best"  # only with recovery

# Fact of the windows of a mix: the facts of the windows of every text. Fact of an export: the rows of its model card.
SOURCES, MIX = "sources", "calibration mix"
COUNTED = "calibrated on responses"  # fact of an export, and part of a result: numbers of calibration tokens
CALIBRATION_TOKENS = "calibration tokens"  # fact of a capture: number of tokens that its statistics use
LOADED_BY = "loaded by"  # fact of an exported multimodal model: the class of transformers
DENSE_LINEARS = "dense linears"  # fact of an import: linears that stay dense by default, with the reason
# Facts of a recovered plan.
LAYERS_RECOVERED, LAYERS_ROLLED_BACK = "layers recovered", "layers rolled back"


def lane_role(beta: float, offset: float) -> str:
    """Return the role of a plan's lane."""
    return f"lane beta {beta:.12g}" + (f" offset {offset:.12g}" if offset else "")
