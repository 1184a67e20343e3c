"""Losses: of one sub-model (bce, softmax, regularizer), of all together (med, negatives), and fused with the scores."""
