"""What the one training loop can be given: a file for each task."""
