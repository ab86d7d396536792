"""The model classes of the Mamba-2 architecture: the shared backbone over Mamba-2 mixers."""

from transformers import GenerationMixin

from hf_archs.model import heads
from hf_archs_mamba2.configuration import ArchMamba2Config


class ArchMamba2PreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchMamba2Config


class ArchMamba2Model(ArchMamba2PreTrainedModel, heads.ArchModel):
    pass


class ArchMamba2ForCausalLM(ArchMamba2PreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchMamba2Model


class ArchMamba2ForMaskedLM(ArchMamba2PreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchMamba2Model


class ArchMamba2ForSequenceClassification(ArchMamba2PreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchMamba2ForTokenClassification(ArchMamba2PreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchMamba2ForQuestionAnswering(ArchMamba2PreTrainedModel, heads.ArchForQuestionAnswering):
    pass
