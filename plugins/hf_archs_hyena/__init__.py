"""Hyena (Poli et al. 2023) as an architecture of hf-archs."""
