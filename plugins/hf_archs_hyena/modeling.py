"""The model classes of the Hyena architecture: the shared backbone over Hyena mixers."""

from __future__ import annotations

from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from hf_archs.backbone import ArchForCausalLM, ArchForMaskedLM, ArchModel, ArchPreTrainedModel
from hf_archs_hyena.configuration import ArchHyenaConfig


class ArchHyenaPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchHyenaConfig


class ArchHyenaModel(ArchModel):
    config_class = ArchHyenaConfig


class ArchHyenaForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchHyenaConfig
    _model_class = ArchHyenaModel


class ArchHyenaForMaskedLM(ArchForMaskedLM):
    config_class = ArchHyenaConfig
    _model_class = ArchHyenaModel


class ArchHyenaForSequenceClassification(GenericForSequenceClassification, ArchHyenaPreTrainedModel):
    pass


class ArchHyenaForTokenClassification(GenericForTokenClassification, ArchHyenaPreTrainedModel):
    pass


class ArchHyenaForQuestionAnswering(GenericForQuestionAnswering, ArchHyenaPreTrainedModel):
    pass
