"""The model classes of the Mamba architecture: the shared backbone over Mamba mixers."""

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
from hf_archs_mamba.configuration import ArchMambaConfig


class ArchMambaPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchMambaConfig


class ArchMambaModel(ArchModel):
    config_class = ArchMambaConfig


class ArchMambaForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchMambaConfig
    _model_class = ArchMambaModel


class ArchMambaForMaskedLM(ArchForMaskedLM):
    config_class = ArchMambaConfig
    _model_class = ArchMambaModel


class ArchMambaForSequenceClassification(GenericForSequenceClassification, ArchMambaPreTrainedModel):
    pass


class ArchMambaForTokenClassification(GenericForTokenClassification, ArchMambaPreTrainedModel):
    pass


class ArchMambaForQuestionAnswering(GenericForQuestionAnswering, ArchMambaPreTrainedModel):
    pass
