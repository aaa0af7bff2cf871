"""The search of ``make demo``, as plain JSON."""

DEMO = {
    "model": "demo",
    "sparsity": 0.6,
    "beta_count": 6,
    "seqlen": 512,
    "calibration_windows": 16,
    "selection_windows": 12,
    "test_windows": 12,
}
