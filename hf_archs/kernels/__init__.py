"""Ops that two or more architectures use."""

from hf_archs.kernels.conv import causal_conv1d

__all__ = ["causal_conv1d"]
