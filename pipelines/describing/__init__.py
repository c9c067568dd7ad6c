"""Parts of what says what lies at a place."""
