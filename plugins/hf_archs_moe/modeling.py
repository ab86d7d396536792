"""The model classes of the mixture of experts: the shared backbone with experts among its feed-forwards."""

from __future__ import annotations

from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from hf_archs.model.backbone import ArchModel
from hf_archs.model.heads import ArchForCausalLM, ArchForMaskedLM
from hf_archs.model.pretrained import ArchPreTrainedModel
from hf_archs_moe.configuration import ArchMoEConfig


class ArchMoEPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchMoEConfig


class ArchMoEModel(ArchModel):
    config_class = ArchMoEConfig


class ArchMoEForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchMoEConfig
    _model_class = ArchMoEModel


class ArchMoEForMaskedLM(ArchForMaskedLM):
    config_class = ArchMoEConfig
    _model_class = ArchMoEModel


class ArchMoEForSequenceClassification(GenericForSequenceClassification, ArchMoEPreTrainedModel):
    pass


class ArchMoEForTokenClassification(GenericForTokenClassification, ArchMoEPreTrainedModel):
    pass


class ArchMoEForQuestionAnswering(GenericForQuestionAnswering, ArchMoEPreTrainedModel):
    pass
