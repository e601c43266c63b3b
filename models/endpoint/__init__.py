"""Policies behind any OpenAI-compatible server."""
