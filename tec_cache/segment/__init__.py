"""Judging a model by the class of each pixel: recipes, heads, joint augmentation, scores and pictures."""
