"""Parts of what says how good a model is."""
