"""Weight files of base models: official releases read safely, renamed to timm's names and loaded strictly.

Both sides of the cache use it (the making side for the base, the training side for a student that
starts from a checkpoint), so it imports neither.
"""
