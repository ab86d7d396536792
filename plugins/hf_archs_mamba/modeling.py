"""The model classes of the Mamba architecture: the shared backbone over Mamba mixers."""

from transformers import GenerationMixin

from hf_archs.model import heads
from hf_archs_mamba.configuration import ArchMambaConfig


class ArchMambaPreTrainedModel(heads.ArchPreTrainedModel):
    config_class = ArchMambaConfig


class ArchMambaModel(ArchMambaPreTrainedModel, heads.ArchModel):
    pass


class ArchMambaForCausalLM(ArchMambaPreTrainedModel, heads.ArchForCausalLM, GenerationMixin):
    _model_class = ArchMambaModel


class ArchMambaForMaskedLM(ArchMambaPreTrainedModel, heads.ArchForMaskedLM):
    _model_class = ArchMambaModel


class ArchMambaForSequenceClassification(ArchMambaPreTrainedModel, heads.ArchForSequenceClassification):
    pass


class ArchMambaForTokenClassification(ArchMambaPreTrainedModel, heads.ArchForTokenClassification):
    pass


class ArchMambaForQuestionAnswering(ArchMambaPreTrainedModel, heads.ArchForQuestionAnswering):
    pass
