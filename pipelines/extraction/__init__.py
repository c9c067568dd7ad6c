"""Stage one's parts: from photos to views, from views to targets."""
