"""This model's code is the Python package hf-archs: pip install hf-archs"""

import hf_archs

try:
    _architecture = hf_archs.get_architecture("mamba2")
except ValueError as error:
    raise ImportError("this model needs the package hf-archs: pip install hf-archs") from error

ArchMamba2Config = _architecture.config_class
ArchMamba2Model = _architecture.model_class
ArchMamba2ForCausalLM = _architecture.causal_lm_class
ArchMamba2ForMaskedLM = _architecture.masked_lm_class
ArchMamba2ForSequenceClassification = _architecture.sequence_classification_class
ArchMamba2ForTokenClassification = _architecture.token_classification_class
ArchMamba2ForQuestionAnswering = _architecture.question_answering_class
