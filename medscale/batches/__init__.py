"""What a step trains on: the order of triples, their corruptions, and the queries of a softmax."""
