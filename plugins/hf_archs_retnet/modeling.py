"""The model classes of the RetNet architecture: the shared backbone over retention and feed-forward."""

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
from hf_archs_retnet.configuration import ArchRetNetConfig


class ArchRetNetPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchRetNetConfig
    # angles and decays in the checkpoints of torchscale and syncdoth's package, which follow from the config
    _keys_to_ignore_on_load_unexpected = [r"retnet_rel_pos\."]


class ArchRetNetModel(ArchRetNetPreTrainedModel, ArchModel):
    pass


class ArchRetNetForCausalLM(ArchRetNetPreTrainedModel, ArchForCausalLM, GenerationMixin):
    _model_class = ArchRetNetModel


class ArchRetNetForMaskedLM(ArchRetNetPreTrainedModel, ArchForMaskedLM):
    _model_class = ArchRetNetModel


class ArchRetNetForSequenceClassification(GenericForSequenceClassification, ArchRetNetPreTrainedModel):
    pass


class ArchRetNetForTokenClassification(GenericForTokenClassification, ArchRetNetPreTrainedModel):
    pass


class ArchRetNetForQuestionAnswering(GenericForQuestionAnswering, ArchRetNetPreTrainedModel):
    pass
