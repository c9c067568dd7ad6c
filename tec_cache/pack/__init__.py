"""A finished cache as self-contained WebDataset tars, to stream from and to share."""
