"""A policy behind an OpenAI-compatible server of our own: `staple serve`."""
