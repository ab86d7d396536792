"""Configs of models: shared fields, models with several kinds of layers, and layer patterns."""
