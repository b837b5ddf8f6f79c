"""Files of pruned models: artefacts, sharded checkpoints, the own class, ONNX and torch.export programs."""
