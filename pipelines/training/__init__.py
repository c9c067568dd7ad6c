"""Stage two's parts."""
