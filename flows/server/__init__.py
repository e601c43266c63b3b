"""The servers of `staple up`, and what Prefect's server holds."""
