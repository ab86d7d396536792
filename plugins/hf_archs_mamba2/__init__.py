"""The mamba2 plugin."""
