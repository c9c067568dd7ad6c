"""The making side's input: photos from shards or folders, and the views cut from them."""
