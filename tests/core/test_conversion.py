"""Every declared native format: models in memory and checkpoints on disk, both ways."""

import builtins
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hf_archs
from hf_archs.commands import cli, loading
from hf_archs.data.text import train_tokenizer
from hf_archs.errors import CheckpointMismatch
from hf_archs.native import reading
from hf_archs.native.conversion import _formats
from hf_archs.registry import get_architecture
from hf_archs.testing.parity import enliven

FORMATS = [pytest.param(architecture, form, id=f"{architecture.name}-{form.name}") for architecture, form in _formats()]
every_format = pytest.mark.parametrize(("architecture", "form"), FORMATS)


def native_config(architecture, form, **fields):
    if form.tiny:
        return getattr(transformers, form.config_name)(**{**form.tiny, **fields})
    return form.write_config(architecture.tiny_config(**form.constants, **fields))


def native_model(architecture, form, kind="causal", dtype=torch.float32, **fields):
    """A native model with random weights and a generation config other than the default."""
    config = native_config(architecture, form, **fields)
    classes = dict(zip(("base", "causal"), form.classes(architecture)))
    ours, theirs = classes[kind]
    model = theirs(config).to(dtype).eval()
    enliven(model)
    if kind == "causal":
        model.generation_config.max_new_tokens = 7
    return model, ours


def assert_same_parameters(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different


@pytest.fixture
def transformers_log():
    """Messages of transformers' logger, which does not propagate, from level WARNING."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


# -- models in memory --------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kind", "tied"), [("base", True), ("causal", True), ("causal", False)])
def test_native_to_ours_and_back(architecture, form, kind, tied, dtype):
    tied = form.constants.get("tie_word_embeddings", tied)
    native, expected_class = native_model(architecture, form, kind, dtype, tie_word_embeddings=tied)
    native.train()
    ours = hf_archs.from_native(native)
    assert type(ours) is expected_class
    assert ours.dtype == dtype
    assert ours.training
    back = hf_archs.to_native(ours, form.name)
    assert type(back) is type(native)
    assert back.training
    assert_same_parameters(back, native)
    assert back.config.to_dict() == {**native.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    if kind == "causal":
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert (back.get_output_embeddings().weight is back.get_input_embeddings().weight) == tied
        assert ours.generation_config.max_new_tokens == back.generation_config.max_new_tokens == 7
    memory = [{p.data_ptr() for p in model.parameters()} for model in (native, ours, back)]
    assert not memory[0] & memory[1]
    assert not memory[1] & memory[2]


@every_format
def test_ours_to_native_and_back_loses_nothing(architecture, form):
    """Also if a bfloat16 model has float32 parameters that bfloat16 cannot represent."""
    native, _ = native_model(architecture, form, dtype=torch.bfloat16)
    ours = hf_archs.from_native(native)
    wide = [p for p in ours.parameters() if p.dtype == torch.float32]
    assert wide or architecture.name == "moe"  # moe may have no recurrence
    with torch.no_grad():
        for parameter in wide[:1]:
            parameter.mul_(1.0001)
    native = hf_archs.to_native(ours)
    assert_same_parameters(hf_archs.from_native(native), ours)
    ids = torch.randint(0, 128, (1, 5))
    with torch.no_grad():
        native(
            native(ids, use_cache=False).logits.argmax(-1), use_cache=False
        )  # where transformers' models use float32


@every_format
def test_a_field_that_transformers_adds_is_not_lost_silently(architecture, form, monkeypatch):
    """With a table from before the field existed."""
    values = {"use_bias": True, "attention_bias": True, "mamba_proj_bias": True, "rms_norm_eps": 0.5}
    name = next(name for name in values if name in form.fields.values())
    older = replace(form, fields={k: v for k, v in form.fields.items() if v != name})
    config = native_config(architecture, form)
    older.read_config(config.to_dict(), architecture.config_class)
    before = getattr(config, name)
    setattr(config, name, values[name])
    with pytest.raises(ValueError, match=f"{name} is {values[name]} in this {form.name} checkpoint.*allowed: {before}"):
        older.read_config(config.to_dict(), architecture.config_class)


@every_format
def test_a_field_that_native_models_lack_is_refused(architecture, form):
    fields = form.read_config(native_config(architecture, form).to_dict(), architecture.config_class)
    config = architecture.config_class(**{**fields, "bidirectional": True})
    with pytest.raises(ValueError, match=rf"bidirectional is True, which a {form.name} model cannot.*allowed: False"):
        hf_archs.to_native(architecture.model_class(config), format=form.name)


def test_models_that_cannot_be_converted():
    tiny = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    with pytest.raises(
        ValueError, match=r"from_native: a GPT2LMHeadModel cannot be converted; allowed are .*MambaModel"
    ):
        hf_archs.from_native(tiny)
    with pytest.raises(ValueError, match=r"to_native: a GPT2LMHeadModel cannot be converted; allowed are Arch"):
        hf_archs.to_native(tiny)
    architecture = get_architecture("mamba")
    model = architecture.causal_lm_class(architecture.tiny_config())
    with pytest.raises(ValueError, match=r"format is 'gguf'; allowed for a \w+ are mamba, falcon_mamba"):
        hf_archs.to_native(model, format="gguf")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("shards", ["one file", "sharded"])
@pytest.mark.parametrize("kind", ["base", "causal"])
def test_read_a_native_checkpoint(architecture, form, kind, shards, tmp_path, transformers_log):
    native, model_class = native_model(architecture, form, kind, tie_word_embeddings=False)
    native.save_pretrained(tmp_path / "native", max_shard_size="5GB" if shards == "one file" else "40KB")
    assert (len(list((tmp_path / "native").glob("*.safetensors"))) > 1) == (shards == "sharded")
    transformers_log.clear()
    ours, info = model_class.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not transformers_log
    assert not any(info.values()), info
    assert_same_parameters(ours, hf_archs.from_native(native))
    assert ours.config.model_type == architecture.model_type
    if kind == "causal":
        assert ours.generation_config.max_new_tokens == 7

    # it is saved in our format, not in that of the file
    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == architecture.model_type
    assert (tmp_path / "ours" / "load_with_hf_archs.py").exists()
    assert type(AutoConfig.from_pretrained(tmp_path / "ours")) is architecture.config_class
    again, info = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_parameters(again, ours)
    if kind == "causal":
        assert_same_parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), ours)
    assert not transformers_log


@every_format
def test_heads_and_base_models_read_each_others_native_checkpoints(architecture, form, tmp_path):
    native, _ = native_model(architecture, form)
    native.save_pretrained(tmp_path / "causal")
    getattr(native, form.prefix).save_pretrained(tmp_path / "base")
    expected = hf_archs.from_native(native)
    assert_same_parameters(architecture.model_class.from_pretrained(tmp_path / "causal"), expected.model)
    causal = architecture.causal_lm_class.from_pretrained(tmp_path / "base")
    tied = expected.config.tie_word_embeddings  # else the head is new
    assert_same_parameters(*(causal, expected) if tied else (causal.model, expected.model))
    classifier = architecture.sequence_classification_class.from_pretrained(tmp_path / "causal", num_labels=3)
    assert_same_parameters(classifier.model, expected.model)
    assert classifier.score.out_features == 3


@every_format
def test_the_usual_arguments_with_a_native_checkpoint(architecture, form, tmp_path):
    native, model_class = native_model(architecture, form)
    native.save_pretrained(tmp_path)
    expected = hf_archs.from_native(native)
    narrow = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16, low_cpu_mem_usage=True, use_cache=False)
    assert not narrow.config.use_cache
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == (torch.float32 if ".ssm." in name else torch.bfloat16), name
        assert torch.equal(parameter, expected.get_parameter(name).to(parameter.dtype)), name
    assert_same_parameters(model_class.from_pretrained(tmp_path, device_map="cpu"), expected)

    ids = torch.randint(0, 128, (1, 9))
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "lm_head": "cpu"}
    spread = model_class.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, expected(ids).logits)

    # a config from the user, ours or native
    for config in (expected.config, native.config):
        assert_same_parameters(model_class.from_pretrained(tmp_path, config=config), expected)


# peft uses an old name of an attribute of transformers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@every_format
def test_an_adapter_on_a_native_checkpoint(architecture, form, tmp_path):
    native, model_class = native_model(architecture, form)
    native.save_pretrained(tmp_path / "native")
    adapted = get_peft_model(model_class.from_pretrained(tmp_path / "native"), LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = model_class.from_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 128, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_a_checkpoint_of_another_architecture(name, tmp_path):
    architecture = get_architecture(name)
    GPT2Config().save_pretrained(tmp_path)
    model_class = architecture.causal_lm_class
    for reader in (model_class, architecture.config_class):
        message = rf"^{tmp_path} is a 'gpt2' checkpoint; {reader.__name__} reads {architecture.model_type}"
        with pytest.raises(ValueError, match=message):
            reader.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a 'gpt2' checkpoint; {model_class.__name__} reads"):
        model_class.from_pretrained(None, config=GPT2Config(), state_dict={})


def test_nowhere_to_read_from(tmp_path):
    model_class = get_architecture("mamba").causal_lm_class
    with pytest.raises(OSError, match=r"has no config\.json, or an empty one; ArchMambaConfig reads hf_archs_mamba, "):
        model_class.from_pretrained(tmp_path)
    model_class.config_class().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="found in directory"):
        model_class.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        model_class.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 32, "depth": 2}')
    for reader in (model_class, model_class.config_class):
        with pytest.raises(ValueError, match=r"no model_type, and its fields \(depth, width, ...\) are of no"):
            reader.from_pretrained(tmp_path)


# -- nothing is silently read wrongly ----------------------------------------------------------------------------------


@every_format
def test_a_field_that_no_table_knows(architecture, form):
    """Known fields of tools and of transformers 4 are ignored; any other unknown field may change the result."""
    raw = native_config(architecture, form).to_dict()
    harmless = {
        "torchscript": False,
        "pruned_heads": {},
        "num_beams": 1,
        "unsloth_version": "2026.1",
        "is_decoder": True,
    }
    expected = form.read_config(raw, architecture.config_class)
    assert form.read_config({**raw, **harmless}, architecture.config_class) == expected
    with pytest.raises(ValueError, match=f"attnres_block_size is 2 in this {form.name} checkpoint, and no field"):
        form.read_config({**raw, "attnres_block_size": 2}, architecture.config_class)


@every_format
def test_quantised_weights_are_not_taken_for_others(architecture, form, tmp_path):
    native, model_class = native_model(architecture, form)
    native.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for said in ({"quant_method": "fp8"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": said}))
        with pytest.raises(ValueError, match=f"quantization_config is '{said['quant_method']}' in this {form.name}"):
            model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@every_format
def test_weights_that_are_missing_or_left_over(architecture, form, whose, tmp_path):
    """Below the heads, weights and parameters must match one to one."""
    native, model_class = native_model(architecture, form)
    (native if whose == "theirs" else hf_archs.from_native(native)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    layer = next(name for name in state if "layers.1." in name and "experts." not in name)
    experts = [name for name in state if re.search(r"layers\.1\..*experts\.0\..*(gate_proj|w1)", name)]
    for changed, said in (
        ({k: v for k, v in state.items() if k != layer}, r"layers\.1\..* is missing in .*, whose config asks for it"),
        ({**state, f"{layer}_scale": state[layer].clone()}, r"_scale stands in .*, whose config has no place for it"),
        ({**state, layer: state[layer][:-1].clone()}, "asks for"),
        *[
            ({k: v for k, v in state.items() if k != name}, "the parts of .*gate_up_proj in .* do not")
            for name in experts
        ],
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatch, match=said):
            model_class.from_pretrained(tmp_path)
    elsewhere = {**state, "v_head.summary.weight": torch.zeros(1)}  # as in TRL
    save_file(elsewhere, file, metadata={"format": "pt"})
    if whose == "ours":
        model_class.from_pretrained(tmp_path)
    else:
        with pytest.raises(CheckpointMismatch, match=r"v_head\.summary\.weight stands in"):
            model_class.from_pretrained(tmp_path)


# -- one look ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """The folders of every ``config.json`` that is opened for reading, one entry per time."""
    folders = []
    opened = io.open

    def watch(file, mode="r", *args, **kwargs):
        if not isinstance(file, int) and Path(file).name == "config.json" and mode.startswith("r"):
            folders.append(Path(file).parent)
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watch)
    monkeypatch.setattr(io, "open", watch)
    return folders


@pytest.mark.parametrize("native", [True, False], ids=["native", "ours"])
def test_a_checkpoint_is_looked_at_once(native, tmp_path, looks, monkeypatch):
    """A command, with its tokenizer, and `from_pretrained` open `config.json` once."""
    architecture = get_architecture("mamba")
    form = architecture.native_formats[0]
    model = native_model(architecture, form, vocab_size=512)[0]
    tokenizer = train_tokenizer(["one look at a checkpoint"] * 4, 300)
    for part in (model if native else hf_archs.from_native(model), tokenizer):
        part.save_pretrained(tmp_path / "here")
    here = str(tmp_path / "here")
    monkeypatch.setenv("HF_ARCHS_DEBUG", "1")  # without it, the program would set logging and threads of this process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    commands = [["convert", here, "-o", str(tmp_path / "there")], ["describe", here], ["generate", here, "one"]]
    for arguments in commands:
        looks.clear()
        cli.app(arguments, standalone_mode=False)
        assert looks == [tmp_path / "here"], arguments
    for reader in (architecture.causal_lm_class, architecture.model_class, architecture.config_class):
        looks.clear()
        reader.from_pretrained(here)
        assert looks == [tmp_path / "here"], reader


def test_one_look_is_enough_for_every_argument(tmp_path):
    """Arguments of the config, the model and the files are told apart without reading the file again."""
    architecture = get_architecture("mamba")
    native, _ = native_model(architecture, architecture.native_formats[0])
    native.save_pretrained(tmp_path / "a" / "b")
    model = architecture.causal_lm_class.from_pretrained(
        tmp_path / "a", subfolder="b", revision="main", local_files_only=True, output_hidden_states=True, num_labels=5
    )
    assert model.config.output_hidden_states
    assert model.config.num_labels == 5
    assert not vars(model.config).keys() & reading.WHERE
    assert_same_parameters(hf_archs.to_native(model), native)
    with pytest.raises(TypeError, match="such_an_argument"):
        architecture.causal_lm_class.from_pretrained(tmp_path / "a", subfolder="b", such_an_argument=1)
    other = architecture.config_class.from_pretrained(tmp_path / "a", subfolder="b", use_cache=False)
    assert not architecture.causal_lm_class.from_pretrained(
        tmp_path / "a", subfolder="b", config=other
    ).config.use_cache


def test_what_one_look_found_is_not_changed_by_a_config_made_of_it(tmp_path):
    architecture = get_architecture("mamba")
    native_model(architecture, architecture.native_formats[0])[0].save_pretrained(tmp_path)
    checkpoint = loading.look_at(str(tmp_path))
    before = json.dumps(checkpoint.raw)
    model = architecture.causal_lm_class.from_pretrained(tmp_path, checkpoint=checkpoint, num_labels=7)
    assert model.config.num_labels == 7
    assert json.dumps(checkpoint.raw) == before
    assert checkpoint.config().num_labels == 2
