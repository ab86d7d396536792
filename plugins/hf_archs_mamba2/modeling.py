"""The model classes of the Mamba-2 architecture: the shared backbone over Mamba-2 mixers."""

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
from hf_archs_mamba2.configuration import ArchMamba2Config


class ArchMamba2PreTrainedModel(ArchPreTrainedModel):
    config_class = ArchMamba2Config


class ArchMamba2Model(ArchModel):
    config_class = ArchMamba2Config


class ArchMamba2ForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchMamba2Config
    _model_class = ArchMamba2Model


class ArchMamba2ForMaskedLM(ArchForMaskedLM):
    config_class = ArchMamba2Config
    _model_class = ArchMamba2Model


class ArchMamba2ForSequenceClassification(GenericForSequenceClassification, ArchMamba2PreTrainedModel):
    pass


class ArchMamba2ForTokenClassification(GenericForTokenClassification, ArchMamba2PreTrainedModel):
    pass


class ArchMamba2ForQuestionAnswering(GenericForQuestionAnswering, ArchMamba2PreTrainedModel):
    pass
