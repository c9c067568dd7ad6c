"""Is a cache what its records say? Checks without a base and without changing anything."""
