"""The op of Mamba-2; it knows nothing of models."""
