"""Judging a model by training a classifier on it: recipes, models, groups of parameters, optimizers, mixed labels."""
