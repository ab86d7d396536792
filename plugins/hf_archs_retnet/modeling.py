"""The model classes of the RetNet architecture: the shared backbone over retention and feed-forward."""

from transformers import GenerationMixin

from hf_archs.model import heads
from hf_archs_retnet.configuration import ArchRetNetConfig


class ArchRetNetPreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchRetNetConfig


class ArchRetNetModel(ArchRetNetPreTrainedModel, heads.ArchModel):
    pass


class ArchRetNetForCausalLM(ArchRetNetPreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchRetNetModel


class ArchRetNetForMaskedLM(ArchRetNetPreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchRetNetModel


class ArchRetNetForSequenceClassification(ArchRetNetPreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchRetNetForTokenClassification(ArchRetNetPreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchRetNetForQuestionAnswering(ArchRetNetPreTrainedModel, heads.ArchForQuestionAnswering):
    pass
