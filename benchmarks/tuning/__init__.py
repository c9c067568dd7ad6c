"""Speed of the reader of annotated photos and of a tuning step; the order of light tuning."""
