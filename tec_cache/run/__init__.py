"""A training run's folder: settings, optimizer, checkpoints, metrics, and the export to timm."""
