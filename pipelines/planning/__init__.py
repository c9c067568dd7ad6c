"""The parts of a plan: what is measured, and the arithmetic on it."""
