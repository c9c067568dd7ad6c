"""The training side's model: a ViT on visible patches, adapters, a shared decoder, losses."""
