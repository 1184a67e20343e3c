"""medscale: one training run, one embedding table, every prefix a good embedding."""

__version__ = "0.1.0"
