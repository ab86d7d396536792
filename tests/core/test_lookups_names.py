"""Names that other libraries look up: class names in their tables, and parts of class names and model types."""

import logging

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality
from transformers.loss import loss_utils
from transformers.modelcard import TrainingSummary
from transformers.models.auto import modeling_auto
from transformers.utils.generic import find_labels

import hf_archs
from hf_archs.testing.contract.models import lively, tokens

ARCHITECTURES = hf_archs.architectures()
TABLES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_head_stands_in_its_table(name):
    """The Trainer, its model cards and `transformers serve` read these tables of class names by model type."""
    architecture = hf_archs.get_architecture(name)
    for auto_class, (_, model_class) in architecture.auto_classes().items():
        if auto_class in TABLES:
            table = getattr(modeling_auto, TABLES[auto_class])
            assert table[architecture.model_type] == model_class.__name__


@pytest.mark.filterwarnings(
    "ignore::hf_archs.model.watching.PlainTrainerWarning"
)  # about the routers' loss, which is omitted
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_label_smoothing_is_of_the_next_token(name, adapted, tmp_path):
    """The Trainer shifts labels only for class names in its table: other models would learn to copy."""
    architecture = hf_archs.get_architecture(name)
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM)).eval()
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[], label_smoothing_factor=0.1))
    ids = tokens(2, 12)
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        logits = model(input_ids=ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_labels_by_class_name(name):
    """The end of the class name selects transformers' loss and the Trainer's names of labels."""
    heads = hf_archs.get_architecture(name).auto_classes()
    config = hf_archs.get_architecture(name).tiny_config(num_labels=2)
    for auto_class, (_, model_class) in heads.items():
        with torch.device("meta"):
            model = model_class(config)
        kind = auto_class.removeprefix("AutoModel")
        assert model.loss_type == (kind or None)
        if kind:
            loss = kind if kind == "ForTokenClassification" else f"{kind}Loss"
            assert model.loss_function is getattr(loss_utils, loss)
        questions = ["start_positions", "end_positions"] if kind == "ForQuestionAnswering" else ["labels"]
        assert find_labels(model_class) == (questions if kind else [])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_name_is_taken_for_another(name):
    """Libraries search model types and class names for these names of families, and treat a match as one of them."""
    megatron = ("megatron-bert", "bert", "gpt2", "t5", "gptj", "llama")
    families = ("gemma", "inkling", "siglip", "donut", "omni", *megatron)  # anywhere in a name
    unsupported = ("reformer", "minimax", "xlnet", "rwkv", "xlstm")  # `generate` does not make their caches
    architecture = hf_archs.get_architecture(name)
    assert architecture.model_type.startswith("hf_archs_")  # so it differs from all names that are compared whole
    names = [architecture.model_type, *(c.__name__ for _, c in architecture.auto_classes().values())]
    for found in names:
        assert not any(family in found.lower() for family in (*families, *unsupported))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norms_are_known_by_their_class_names(name):
    """transformers initialises norms by class name, and accelerate's FSDP2 finds the last norm by it."""
    architecture = hf_archs.get_architecture(name)
    model = architecture.causal_lm_class(architecture.tiny_config())
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    assert model.model.norm in norms
    assert len(norms) > model.config.num_hidden_layers
    for norm in norms:
        assert (norm.weight == 1).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pipelines_know_our_classes(name, word_tokenizer):
    """They warn that a class outside their tables is not supported."""
    architecture = hf_archs.get_architecture(name)
    tasks = {
        "text-generation": architecture.causal_lm_class,
        "text-classification": architecture.sequence_classification_class,
        "token-classification": architecture.token_classification_class,
        "fill-mask": architecture.masked_lm_class,
    }
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        for task, model_class in tasks.items():
            pipeline(task, model=model_class(architecture.tiny_config()), tokenizer=word_tokenizer, device="cpu")
    finally:
        logger.removeHandler(handler)
    assert not [line for line in said if "not supported" in line]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_card_of_the_trainer_names_the_task(name, tmp_path):
    """The card looks the class name up in the tables of heads."""
    tasks = {
        "text-generation": "AutoModelForCausalLM",
        "fill-mask": "AutoModelForMaskedLM",
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
    }
    architecture = hf_archs.get_architecture(name)
    for task, auto_class in tasks.items():
        model = architecture.auto_classes()[auto_class][1](architecture.tiny_config())
        trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
        assert TrainingSummary.from_trainer(trainer).tasks == task


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, word_tokenizer, tmp_path_factory):
    """The folder of a saved model with its tokenizer, and the model's class."""
    path = tmp_path_factory.mktemp(request.param)
    architecture = hf_archs.get_architecture(request.param)
    lively(architecture.causal_lm_class, architecture.tiny_config()).save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return str(path), architecture.causal_lm_class


def test_a_pipeline_of_a_folder(folder):
    """It looks for `config.architectures` in transformers, then uses the Auto class of its task."""
    path, model_class = folder
    assert type(pipeline("text-generation", model=path, device="cpu").model) is model_class


def test_serving_a_folder(folder):
    """`transformers serve` looks for `config.architectures` in transformers, and for the class in the tables."""
    path, model_class = folder
    manager = ModelManager(device="cpu")
    try:
        model, _ = manager.load_model_and_processor(manager.process_model_name(path))
        assert type(model) is model_class
        assert manager.get_model_modality(model) is Modality.LLM
    finally:
        manager.shutdown()


def test_trl_loads_a_folder(folder):
    """It looks for `config.architectures` in transformers, then for an Auto class in `auto_map`."""
    utils = pytest.importorskip("trl.trainer.utils")
    path, model_class = folder
    assert type(utils.create_model_from_path(path, dtype="float32", device_map=None)) is model_class


def test_peft_finds_the_class_of_an_adapter_without_a_task(folder, tmp_path):
    """The adapter's config holds the name and module of the class."""
    path, model_class = folder
    model = model_class.from_pretrained(path)
    get_peft_model(model, LoraConfig(init_lora_weights=False)).save_pretrained(tmp_path)
    found = AutoPeftModel.from_pretrained(tmp_path, import_allowlist=[model_class.__module__])
    assert type(found.get_base_model()) is model_class
