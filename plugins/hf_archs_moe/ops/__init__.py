"""The op of mixtures of experts; it knows nothing of models."""
