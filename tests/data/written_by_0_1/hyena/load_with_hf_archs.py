"""This model's code is the Python package hf-archs: pip install hf-archs"""

import hf_archs

try:
    _architecture = hf_archs.get_architecture("hyena")
except ValueError as error:
    raise ImportError("this model needs the package hf-archs: pip install hf-archs") from error

ArchHyenaConfig = _architecture.config_class
ArchHyenaModel = _architecture.model_class
ArchHyenaForCausalLM = _architecture.causal_lm_class
ArchHyenaForMaskedLM = _architecture.masked_lm_class
ArchHyenaForSequenceClassification = _architecture.sequence_classification_class
ArchHyenaForTokenClassification = _architecture.token_classification_class
ArchHyenaForQuestionAnswering = _architecture.question_answering_class
