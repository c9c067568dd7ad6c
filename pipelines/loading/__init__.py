"""Models by what a user names them."""
