"""Measurements: one command, one table, ratios within one run."""
