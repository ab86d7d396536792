"""Checkpoints: foreign formats, both ways, and what a saved one of ours carries."""
