"""What an experiment will take: tokens, memory, disk and hours."""
