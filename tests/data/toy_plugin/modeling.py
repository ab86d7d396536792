"""The model classes."""

from hf_archs.backbone import ArchForCausalLM, ArchForMaskedLM, ArchModel, ArchPreTrainedModel
from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from toy_plugin.mixer import ArchToyConfig


class ArchToyPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchToyConfig


class ArchToyModel(ArchToyPreTrainedModel, ArchModel):
    pass


class ArchToyForCausalLM(ArchToyPreTrainedModel, ArchForCausalLM, GenerationMixin):
    _model_class = ArchToyModel


class ArchToyForMaskedLM(ArchToyPreTrainedModel, ArchForMaskedLM):
    _model_class = ArchToyModel


class ArchToyForSequenceClassification(GenericForSequenceClassification, ArchToyPreTrainedModel):
    pass


class ArchToyForTokenClassification(GenericForTokenClassification, ArchToyPreTrainedModel):
    pass


class ArchToyForQuestionAnswering(GenericForQuestionAnswering, ArchToyPreTrainedModel):
    pass
