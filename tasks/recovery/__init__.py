"""Recovery of pruned models: the layers of chosen plans, and distillation."""
