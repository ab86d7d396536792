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


class ArchRetNetPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchRetNetConfig


class ArchRetNetModel(ArchModel):
    config_class = ArchRetNetConfig


class ArchRetNetForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchRetNetConfig
    _model_class = ArchRetNetModel


class ArchRetNetForMaskedLM(ArchForMaskedLM):
    config_class = ArchRetNetConfig
    _model_class = ArchRetNetModel


class ArchRetNetForSequenceClassification(GenericForSequenceClassification, ArchRetNetPreTrainedModel):
    pass


class ArchRetNetForTokenClassification(GenericForTokenClassification, ArchRetNetPreTrainedModel):
    pass


class ArchRetNetForQuestionAnswering(GenericForQuestionAnswering, ArchRetNetPreTrainedModel):
    pass
