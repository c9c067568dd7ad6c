"""The cache on disk: the only thing that the making side and the training side share."""
