"""Mixtures of experts as an architecture of hf-archs, and their feed-forward for every other one."""
