"""Search strategies: which plan to try next."""
