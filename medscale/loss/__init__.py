"""Losses: of one sub-model (bce, softmax, regularizer) and of all together (med)."""
