"""RetNet (Sun et al. 2023) as an architecture of hf-archs, and its op `retention`."""

from hf_archs_retnet.retention import multi_scale_log_decay, retention, retention_parallel, retention_reference

__all__ = ["multi_scale_log_decay", "retention", "retention_parallel", "retention_reference"]
