"""This model's code is the Python package hf-archs: pip install hf-archs"""

import hf_archs

try:
    _architecture = hf_archs.get_architecture("mamba")
except ValueError as error:
    raise ImportError("this model needs the package hf-archs: pip install hf-archs") from error

ArchMambaConfig = _architecture.config_class
ArchMambaModel = _architecture.model_class
ArchMambaForCausalLM = _architecture.causal_lm_class
ArchMambaForMaskedLM = _architecture.masked_lm_class
ArchMambaForSequenceClassification = _architecture.sequence_classification_class
ArchMambaForTokenClassification = _architecture.token_classification_class
ArchMambaForQuestionAnswering = _architecture.question_answering_class
