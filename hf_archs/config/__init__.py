"""What a model is told: the fields that all share, models of several kinds of layers, their pattern."""
