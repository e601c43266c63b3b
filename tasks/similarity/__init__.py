"""How near a response comes to the gold response."""
