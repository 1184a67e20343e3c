"""The croppable model: units and levels, scorers, one-pass prefix scores, sharded entity tables."""
