"""The model classes of the RetNet architecture: the shared backbone over retention and feed-forward."""

from __future__ import annotations

from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from hf_archs.backbone import ArchForCausalLM, ArchForMaskedLM, ArchModel, ArchPreTrainedModel
from hf_archs_retnet.configuration import ArchRetNetConfig

# angles and decays in the checkpoints of torchscale, which follow from the config
_IGNORED = [r"retnet_rel_pos\."]


class ArchRetNetPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchRetNetConfig
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchRetNetModel(ArchModel):
    config_class = ArchRetNetConfig
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchRetNetForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchRetNetConfig
    _model_class = ArchRetNetModel
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchRetNetForMaskedLM(ArchForMaskedLM):
    config_class = ArchRetNetConfig
    _model_class = ArchRetNetModel
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchRetNetForSequenceClassification(GenericForSequenceClassification, ArchRetNetPreTrainedModel):
    pass


class ArchRetNetForTokenClassification(GenericForTokenClassification, ArchRetNetPreTrainedModel):
    pass


class ArchRetNetForQuestionAnswering(GenericForQuestionAnswering, ArchRetNetPreTrainedModel):
    pass
