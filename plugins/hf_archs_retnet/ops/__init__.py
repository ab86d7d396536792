"""The ops of RetNet; they know nothing of models."""
