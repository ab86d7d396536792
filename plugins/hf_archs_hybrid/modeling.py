"""The model classes of the hybrid architecture: the shared backbone over the layers of its config."""

from transformers import GenerationMixin

from hf_archs.model import heads
from hf_archs_hybrid.configuration import ArchHybridConfig


class ArchHybridPreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchHybridConfig


class ArchHybridModel(ArchHybridPreTrainedModel, heads.ArchModel):
    pass


class ArchHybridForCausalLM(ArchHybridPreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchHybridModel


class ArchHybridForMaskedLM(ArchHybridPreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchHybridModel


class ArchHybridForSequenceClassification(ArchHybridPreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchHybridForTokenClassification(ArchHybridPreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchHybridForQuestionAnswering(ArchHybridPreTrainedModel, heads.ArchForQuestionAnswering):
    pass
