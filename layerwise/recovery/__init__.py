"""Recovery of quality after pruning: refit, block-wise training, distillation."""
