"""This model's code is the Python package hf-archs: pip install hf-archs"""

import hf_archs

try:
    _architecture = hf_archs.get_architecture("retnet")
except ValueError as error:
    raise ImportError("this model needs the package hf-archs: pip install hf-archs") from error

ArchRetNetConfig = _architecture.config_class
ArchRetNetModel = _architecture.model_class
ArchRetNetForCausalLM = _architecture.causal_lm_class
ArchRetNetForMaskedLM = _architecture.masked_lm_class
ArchRetNetForSequenceClassification = _architecture.sequence_classification_class
ArchRetNetForTokenClassification = _architecture.token_classification_class
ArchRetNetForQuestionAnswering = _architecture.question_answering_class
