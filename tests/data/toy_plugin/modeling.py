"""The model classes."""

from transformers import GenerationMixin

from hf_archs.model import heads
from toy_plugin.mixer import ArchToyConfig


class ArchToyPreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchToyConfig


class ArchToyModel(ArchToyPreTrainedModel, heads.ArchModel):
    pass


class ArchToyForCausalLM(ArchToyPreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchToyModel


class ArchToyForMaskedLM(ArchToyPreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchToyModel


class ArchToyForSequenceClassification(ArchToyPreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchToyForTokenClassification(ArchToyPreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchToyForQuestionAnswering(ArchToyPreTrainedModel, heads.ArchForQuestionAnswering):
    pass
