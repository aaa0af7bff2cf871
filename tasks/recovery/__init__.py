"""Recovery of the quality of a pruned model, as tasks."""
