"""The embedded worlds: what one offers (`base`), and which there are (`registry`)."""
