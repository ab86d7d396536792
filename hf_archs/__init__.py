"""hf-archs: architectures beyond the Transformer, as ordinary models of the Hugging Face libraries."""

__version__ = "0.1.0"
