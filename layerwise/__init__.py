"""Layer-by-layer pruning of decoder-only language models: numerics on torch and transformers, nothing else."""
