"""Is a new model better than its base? See `__main__`."""
