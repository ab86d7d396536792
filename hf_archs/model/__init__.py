"""The one backbone, its blocks and its heads."""
