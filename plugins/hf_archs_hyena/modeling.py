"""The model classes of the Hyena architecture: the shared backbone over Hyena mixers."""

from transformers import GenerationMixin

from hf_archs.model import heads
from hf_archs_hyena.configuration import ArchHyenaConfig


class ArchHyenaPreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchHyenaConfig


class ArchHyenaModel(ArchHyenaPreTrainedModel, heads.ArchModel):
    pass


class ArchHyenaForCausalLM(ArchHyenaPreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchHyenaModel


class ArchHyenaForMaskedLM(ArchHyenaPreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchHyenaModel


class ArchHyenaForSequenceClassification(ArchHyenaPreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchHyenaForTokenClassification(ArchHyenaPreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchHyenaForQuestionAnswering(ArchHyenaPreTrainedModel, heads.ArchForQuestionAnswering):
    pass
