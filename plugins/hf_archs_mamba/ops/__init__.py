"""The op of Mamba; it knows nothing of models."""
