"""The embedded world and its models; nothing here imports torch."""

NAMES = ("planted", "planted-sami", "planted-sami-small")
"""What `policy.model` may be without a directory or download: `pretrain.RECIPES`."""
