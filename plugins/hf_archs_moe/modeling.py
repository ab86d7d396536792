"""The model classes of the mixture of experts: the shared backbone with experts among its feed-forwards."""

from transformers import GenerationMixin

from hf_archs.model import heads
from hf_archs_moe.configuration import ArchMoEConfig


class ArchMoEPreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchMoEConfig


class ArchMoEModel(ArchMoEPreTrainedModel, heads.ArchModel):
    pass


class ArchMoEForCausalLM(ArchMoEPreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchMoEModel


class ArchMoEForMaskedLM(ArchMoEPreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchMoEModel


class ArchMoEForSequenceClassification(ArchMoEPreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchMoEForTokenClassification(ArchMoEPreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchMoEForQuestionAnswering(ArchMoEPreTrainedModel, heads.ArchForQuestionAnswering):
    pass
