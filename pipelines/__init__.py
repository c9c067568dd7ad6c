"""The programs: each stage read from top to bottom, made of the parts in `tec_cache`."""
