"""Zero-shot tasks of lm-eval: load them, score the requests, compare the accuracy."""
