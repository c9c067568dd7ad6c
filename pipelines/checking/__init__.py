"""Parts of what says whether a cache is true."""
