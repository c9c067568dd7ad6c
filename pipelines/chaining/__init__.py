"""Parts of the rounds: what each call is told, what has been done, and what it will take."""
