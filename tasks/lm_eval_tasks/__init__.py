"""Zero-shot tasks of lm-eval: loading, scoring, comparing."""
