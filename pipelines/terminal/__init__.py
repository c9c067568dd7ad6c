"""What stands between the programs and whoever called them: signals, streams, options."""
