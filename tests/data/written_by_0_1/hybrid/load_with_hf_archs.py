"""This model's code is the Python package hf-archs: pip install hf-archs"""

import hf_archs

try:
    _architecture = hf_archs.get_architecture("hybrid")
except ValueError as error:
    raise ImportError("this model needs the package hf-archs: pip install hf-archs") from error

ArchHybridConfig = _architecture.config_class
ArchHybridModel = _architecture.model_class
ArchHybridForCausalLM = _architecture.causal_lm_class
ArchHybridForMaskedLM = _architecture.masked_lm_class
ArchHybridForSequenceClassification = _architecture.sequence_classification_class
ArchHybridForTokenClassification = _architecture.token_classification_class
ArchHybridForQuestionAnswering = _architecture.question_answering_class
