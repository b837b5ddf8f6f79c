"""Recovery of accuracy after removal: compensation in closed form, fine-tuning, distillation."""
