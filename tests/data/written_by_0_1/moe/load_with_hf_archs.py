"""This model's code is the Python package hf-archs: pip install hf-archs"""

import hf_archs

try:
    _architecture = hf_archs.get_architecture("moe")
except ValueError as error:
    raise ImportError("this model needs the package hf-archs: pip install hf-archs") from error

ArchMoEConfig = _architecture.config_class
ArchMoEModel = _architecture.model_class
ArchMoEForCausalLM = _architecture.causal_lm_class
ArchMoEForMaskedLM = _architecture.masked_lm_class
ArchMoEForSequenceClassification = _architecture.sequence_classification_class
ArchMoEForTokenClassification = _architecture.token_classification_class
ArchMoEForQuestionAnswering = _architecture.question_answering_class
