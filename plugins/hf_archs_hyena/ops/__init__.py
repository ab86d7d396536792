"""The ops of Hyena; they know nothing of models."""
