"""Criterion of a search: the figure on the selection windows that the best plan minimises."""

from typing import Literal

Criterion = Literal["perplexity", "kl"]
KL = "KL divergence"  # from the dense model, in sentences and tables
