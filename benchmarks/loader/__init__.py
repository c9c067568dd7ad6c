"""Views per second and memory of the cache's loader, and other stores and loaders beside it."""
