"""The model classes of the hybrid architecture: the shared backbone over the layers of its config."""

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
from hf_archs_hybrid.configuration import ArchHybridConfig


class ArchHybridPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchHybridConfig


class ArchHybridModel(ArchModel):
    config_class = ArchHybridConfig


class ArchHybridForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchHybridConfig
    _model_class = ArchHybridModel


class ArchHybridForMaskedLM(ArchForMaskedLM):
    config_class = ArchHybridConfig
    _model_class = ArchHybridModel


class ArchHybridForSequenceClassification(GenericForSequenceClassification, ArchHybridPreTrainedModel):
    pass


class ArchHybridForTokenClassification(GenericForTokenClassification, ArchHybridPreTrainedModel):
    pass


class ArchHybridForQuestionAnswering(GenericForQuestionAnswering, ArchHybridPreTrainedModel):
    pass
