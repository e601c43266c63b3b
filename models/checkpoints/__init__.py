"""Model directories as files: what they hold, and whether it can be used. No torch."""
