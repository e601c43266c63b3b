"""The user's prompts and gold responses, read from their files."""
