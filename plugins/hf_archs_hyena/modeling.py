"""The model classes of the Hyena architecture: the shared backbone over Hyena mixers."""

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
from hf_archs_hyena.configuration import ArchHyenaConfig

# in HyenaDNA's checkpoints: the lags, which follow from the config, and figures that its training kept
_IGNORED = [r"filter_fn\.pos_emb\.t$", r"torchmetrics"]


class ArchHyenaPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchHyenaConfig
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchHyenaModel(ArchModel):
    config_class = ArchHyenaConfig
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchHyenaForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchHyenaConfig
    _model_class = ArchHyenaModel
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchHyenaForMaskedLM(ArchForMaskedLM):
    config_class = ArchHyenaConfig
    _model_class = ArchHyenaModel
    _keys_to_ignore_on_load_unexpected = _IGNORED


class ArchHyenaForSequenceClassification(GenericForSequenceClassification, ArchHyenaPreTrainedModel):
    pass


class ArchHyenaForTokenClassification(GenericForTokenClassification, ArchHyenaPreTrainedModel):
    pass


class ArchHyenaForQuestionAnswering(GenericForQuestionAnswering, ArchHyenaPreTrainedModel):
    pass
