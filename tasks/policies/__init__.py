"""The policy that a stage samples from, and how it answers."""
