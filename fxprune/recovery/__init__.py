"""What makes up for removed channels: compensation in closed form, fine-tuning, distillation."""
