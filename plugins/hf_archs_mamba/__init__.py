"""The mamba plugin."""
