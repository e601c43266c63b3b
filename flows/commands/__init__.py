"""The command line: `staple`, and what each command prints."""
