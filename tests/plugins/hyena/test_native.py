"""HyenaDNA checkpoints: read and written bit for bit, and computed by the published mathematics.

The peer is a HyenaDNA written here from the papers (Poli et al. 2023, Nguyen et al. 2023) in the layout of the
published files: direct sums in place of Fourier transforms, one long formula in place of modules.
"""

import json
import math
import re
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

import hf_archs
from hf_archs.commands import cli
from hf_archs.native.conversion import from_native, to_native
from hf_archs.native.formats import NativeCheckpoint
from hf_archs.native.reading import read_config
from hf_archs.testing.contract.models import assert_close, gradients, logits, weighed
from hf_archs_hyena import (
    ArchHyenaConfig,
    ArchHyenaForCausalLM,
    ArchHyenaForSequenceClassification,
    ArchHyenaModel,
    dna_tokenizer,
)

# as in the published files, but smaller
CONFIG = {
    "activation_freq": 10,
    "architectures": ["HyenaDNAForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_hyena.HyenaConfig"},
    "d_inner": 48,
    "d_model": 12,
    "emb_dim": 5,
    "embed_dropout": 0.1,
    "filter_order": 16,
    "hyena_dropout": 0.0,
    "hyena_filter_dropout": 0.0,
    "hyena_order": 2,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_seq_len": 66,
    "model_type": "hyenadna",
    "n_layer": 2,
    "num_inner_mlps": 2,
    "pad_vocab_size_multiple": 8,
    "short_filter_order": 3,
    "torch_dtype": "float32",
    "train_freq": True,
    "use_bias": True,
    "vocab_size": 12,
}


def parameters(config=CONFIG, head=True, shared=(1, 3, 5)) -> dict[str, torch.Tensor]:
    """Random parameters in the published layout; positions and decays differ from their formulas, as after training."""
    d, w, n = config["d_model"], config["filter_order"], config["max_seq_len"]
    state = {"hyena.backbone.embeddings.word_embeddings.weight": torch.randn(16, d)}
    for i in range(config["n_layer"]):
        layer = f"hyena.backbone.layers.{i}."
        shapes = {
            "mixer.in_proj": (3 * d, d),
            "mixer.out_proj": (d, d),
            "mlp.fc1": (config["d_inner"], d),
            "mlp.fc2": (d, config["d_inner"]),
            "mixer.filter_fn.implicit_filter.0": (w, config["emb_dim"]),
            "mixer.filter_fn.implicit_filter.2": (w, w),
            "mixer.filter_fn.implicit_filter.4": (w, w),
        }
        for name, (out, into) in shapes.items():
            state[f"{layer}{name}.weight"] = torch.randn(out, into) / math.sqrt(into)
            state[f"{layer}{name}.bias"] = 0.1 * torch.randn(out)
        state[f"{layer}mixer.filter_fn.implicit_filter.6.weight"] = torch.randn(d, w) / math.sqrt(w)
        for norm in ("norm1", "norm2"):
            state[f"{layer}{norm}.weight"] = 1 + 0.1 * torch.randn(d)
            state[f"{layer}{norm}.bias"] = 0.1 * torch.randn(d)
        state[f"{layer}mixer.short_filter.weight"] = torch.randn(3 * d, 1, 3)
        state[f"{layer}mixer.short_filter.bias"] = 0.1 * torch.randn(3 * d)
        state[f"{layer}mixer.filter_fn.bias"] = torch.randn(d)
        lag = torch.arange(n) / n
        angle = 2 * math.pi * lag[:, None] * torch.tensor([1e-4, 1.0])
        z = torch.cat([torch.linspace(0, 1, n)[:, None], angle.cos(), -angle.sin()], 1)[None]
        state[f"{layer}mixer.filter_fn.pos_emb.z"] = z + 1e-3 * torch.randn_like(z)
        state[f"{layer}mixer.filter_fn.pos_emb.t"] = torch.linspace(0, 1, n)[None, :, None]
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, d)
        state[f"{layer}mixer.filter_fn.modulation.deltas"] = deltas[None, None]
        freq = 10 + torch.randn(1, w)
        for k in shared:
            state[f"{layer}mixer.filter_fn.implicit_filter.{k}.freq"] = freq
    state["hyena.backbone.ln_f.weight"] = 1 + 0.1 * torch.randn(d)
    state["hyena.backbone.ln_f.bias"] = 0.1 * torch.randn(d)
    if head:
        state["lm_head.weight"] = state["hyena.backbone.embeddings.word_embeddings.weight"]
    return state


# as in the published files of the original layout, but smaller
ORIGINAL = {
    "d_model": 12,
    "n_layer": 2,
    "d_inner": 48,
    "vocab_size": 12,
    "resid_dropout": 0.0,
    "embed_dropout": 0.1,
    "fused_mlp": False,
    "fused_dropout_add_ln": True,
    "checkpoint_mixer": True,
    "checkpoint_mlp": True,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
    "return_hidden_state": True,
    "layer": {
        "_name_": "hyena",
        "emb_dim": 5,
        "filter_order": 16,
        "local_order": 3,
        "l_max": 66,
        "modulate": True,
        "w": 10,
        "lr": 0.0006,
        "wd": 0.0,
        "lr_pos_emb": 0.0,
    },
}
FORMS = hf_archs.get_architecture("hyena").native_formats


def original(state, checkpointed=False):
    """Parameters of the published layout under the original layout's names, as Lightning saves them."""
    named = {"model." + name.removeprefix("hyena."): tensor for name, tensor in state.items()}
    if checkpointed:  # names after training with activation checkpointing
        named = {re.sub(r"\.(mixer|mlp)\.", r".\1.layer.", name): tensor for name, tensor in named.items()}
    return {**named, "train_torchmetrics.count": torch.zeros(1)}


def write_original(folder, content, config=ORIGINAL):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(content, folder / "weights.ckpt")
    return folder


def other(name, value):
    """Another value of a field, of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (list, str)):
        return [0] if isinstance(value, list) else f"{value}x"
    return value + 2 if isinstance(value, int) else value + 0.1


def in_float64(state):
    """The same parameters; the lags, which are not parameters, exactly."""
    lags = torch.linspace(0, 1, CONFIG["max_seq_len"], dtype=torch.float64)[None, :, None]
    return {name: lags if name.endswith("pos_emb.t") else tensor.double() for name, tensor in state.items()}


def by_the_papers(state, ids, *, eps=1e-5, shift=0.05, freq=None):
    """Logits of a HyenaDNA with these parameters, in their precision; ``ids`` is (batch, length)."""
    p = SimpleNamespace(get=lambda name: state[f"hyena.backbone.{name}"])
    x = p.get("embeddings.word_embeddings.weight")[ids]
    length = ids.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)  # (t, s)
    layers = {name.split(".")[3] for name in state if ".layers." in name}
    for i in range(len(layers)):

        def get(name, i=i):
            return p.get(f"layers.{i}.{name}")

        def linear(x, name, get=get):
            return x @ get(f"{name}.weight").t() + get(f"{name}.bias")

        def norm(x, name, get=get):
            return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), eps)

        u = linear(norm(x, "norm1"), "mixer.in_proj")
        short = get("mixer.short_filter.weight")[:, 0]
        taps = short.shape[1]
        before = F.pad(u, (0, 0, taps - 1, 0))  # zeros before the first token
        u = sum(before[:, k : k + length] * short[:, k] for k in range(taps)) + get("mixer.short_filter.bias")
        x0, x1, v = u.chunk(3, dim=-1)
        h = get("mixer.filter_fn.pos_emb.z")[0, :length]
        frequency = get("mixer.filter_fn.implicit_filter.1.freq") if freq is None else freq
        for k in (0, 2, 4):
            h = torch.sin(frequency * linear(h, f"mixer.filter_fn.implicit_filter.{k}"))
        h = h @ get("mixer.filter_fn.implicit_filter.6.weight").t()
        t = get("mixer.filter_fn.pos_emb.t")[0, :length]
        h = h * (torch.exp(-t * get("mixer.filter_fn.modulation.deltas")[0].abs()) + shift)  # (length, d)
        matrix = torch.where((lag >= 0)[:, :, None], h[lag.clamp(min=0)], 0)  # (t, s, d)
        gated = v * x1
        y = torch.einsum("tsd,bsd->btd", matrix, gated) + get("mixer.filter_fn.bias") * gated
        x = x + linear(y * x0, "mixer.out_proj")
        x = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1"), approximate="tanh"), "mlp.fc2")
    x = F.layer_norm(x, x.shape[-1:], p.get("ln_f.weight"), p.get("ln_f.bias"), eps)
    return x @ state["lm_head.weight"].t()


@pytest.fixture
def ids():
    return torch.randint(7, 12, (2, 50))


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "published", CONFIG, parameters())


def write(folder, config, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


class TestMathematics:
    def test_logits(self, ids):
        state = parameters()
        model = from_native(NativeCheckpoint(CONFIG, state))
        assert_close(logits(model, ids), by_the_papers(state, ids), "float32", 2e-5)
        wide = in_float64(state)
        assert_close(logits(model.double(), ids), by_the_papers(wide, ids), "float64", 1e-11)

    def test_every_gradient(self, ids):
        state = in_float64(parameters())
        model = from_native(NativeCheckpoint(CONFIG, state)).double()
        found = gradients(model, weighed(model(ids).logits))
        once = (".3.freq", ".5.freq", "pos_emb.t", "lm_head.weight")  # not parameters, or second names
        wanted = {name: tensor.requires_grad_() for name, tensor in state.items() if not name.endswith(once)}
        tied = {"lm_head.weight": wanted["hyena.backbone.embeddings.word_embeddings.weight"]}
        loss = weighed(by_the_papers({**state, **wanted, **tied}, ids))
        form = hf_archs.get_architecture("hyena").native_formats[0]
        for name, expected in zip(wanted, torch.autograd.grad(loss, list(wanted.values()))):
            assert_close(found.pop(form.ours(name)), expected, name, 1e-9)
        assert not found

    def test_a_frequency_that_is_not_trained(self, ids):
        """The frequency comes from the config: it is in no file, and no optimizer gets it."""
        state, config = parameters(shared=()), {**CONFIG, "train_freq": False, "activation_freq": 3}
        model = from_native(NativeCheckpoint(config, state))
        assert_close(logits(model, ids), by_the_papers(state, ids, freq=3.0), "float32", 2e-5)
        assert not [name for name, _ in model.named_parameters() if name.endswith("freq")]
        back = to_native(model)
        assert {name: back.config[name] for name in ("train_freq", "activation_freq")} == {
            "train_freq": False,
            "activation_freq": 3,
        }
        assert back.state_dict.keys() == state.keys()

    def test_computed_positions_are_those_of_the_papers(self, ids):
        """Without learned positions, features and windows come from the formulas, for any number of bands."""
        architecture = hf_archs.get_architecture("hyena")
        model = architecture.causal_lm_class(architecture.tiny_config(max_positions=66, position_bands=3)).eval()
        ssm = model.model.layers[0].mixer.ssm
        n, bands = 66, 3
        t = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
        f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
        w = 2 * math.pi * torch.arange(n, dtype=torch.float64)[:, None] / n
        z = torch.cat([t, torch.cos(-f * w), torch.sin(-f * w)], 1)
        weights = [layer.weight.double() for layer in ssm.layers]
        for layer, weight in zip(ssm.layers[:-1], weights):
            z = torch.sin(ssm.freq.double() * (z @ weight.t() + layer.bias.double()))
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, 64, dtype=torch.float64)
        expected = (z @ weights[-1].t()) * (torch.exp(-t * deltas.abs()) + 0.05)
        assert_close(ssm.taps(n).t(), expected, "taps")
        assert_close(ssm.taps(20), ssm.taps(n)[:, :20], "the first taps")


class TestFiles:
    @pytest.mark.parametrize("shared", [(1, 3, 5), (1,), (5,)])
    def test_read_bit_for_bit(self, shared, tmp_path):
        """Files may have any of the shared frequency's names."""
        state = parameters(shared=shared)
        folder = write(tmp_path / "published", CONFIG, state)
        model, info = ArchHyenaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        form = hf_archs.get_architecture("hyena").native_formats[0]
        ours = model.state_dict()
        read = {form.ours(name): tensor for name, tensor in state.items() if not form.is_buffer(name)}
        assert read.keys() == ours.keys()
        for name, tensor in read.items():
            assert torch.equal(ours[name], tensor), name
        assert model.config.vocab_size == 16
        assert model.config.intermediate_size == 48
        assert model.config.pad_token_id == 4

    def test_round_trip(self, checkpoint, ids, tmp_path):
        stored = load_file(checkpoint / "model.safetensors")
        model = ArchHyenaForCausalLM.from_pretrained(checkpoint)
        model.save_pretrained(tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(logits(again, ids), logits(model, ids))
        native = to_native(again)
        native.save_pretrained(tmp_path / "theirs")
        written = load_file(tmp_path / "theirs" / "model.safetensors")
        for name, tensor in stored.items():
            if name.endswith((".3.freq", ".5.freq")):
                continue  # a second name, which the published class ties
            assert torch.equal(written.pop(name), tensor), name
        assert not written
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        for name in set(CONFIG) - {"auto_map", "torch_dtype", "vocab_size"}:
            assert config[name] == CONFIG[name], name
        assert config["vocab_size"] == 16  # padded like the embedding
        third = ArchHyenaForCausalLM.from_pretrained(tmp_path / "theirs")
        assert torch.equal(logits(third, ids), logits(model, ids))

    def test_base_model_and_classification_head(self, tmp_path, ids):
        state = {n: t for n, t in parameters().items() if n != "lm_head.weight"}
        state["score.weight"] = torch.randn(2, 12)
        config = {**CONFIG, "architectures": ["HyenaDNAForSequenceClassification"], "num_labels": 2}
        folder = write(tmp_path / "published", config, state)
        model = ArchHyenaForSequenceClassification.from_pretrained(folder)
        assert torch.equal(model.score.weight, state["score.weight"])
        base = ArchHyenaModel.from_pretrained(folder)
        with torch.no_grad():
            hidden = base(ids).last_hidden_state
            assert_close(model(ids).logits, hidden[:, -1] @ state["score.weight"].t(), "score")
        model.save_pretrained(tmp_path / "ours")
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        assert torch.equal(found.score.weight, state["score.weight"])

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_every_field_is_read_refused_or_known_to_change_nothing(self, form):
        """Each field of theirs, changed alone, changes a field of ours or is refused by its name."""
        config_class = hf_archs.get_architecture("hyena").config_class
        raw = CONFIG if form.name == "hyenadna" else ORIGINAL
        before = form.read_config(raw, config_class)
        for name, default in form.expand(raw)[0].items():
            if name in {*form.ignored, "architectures", "auto_map", "torch_dtype", "bands"} - {
                "layer.emb_dim",
                "emb_dim",
            }:
                continue
            changed = {**raw, name: other(name, default)}
            if name.startswith("layer."):
                changed = {**raw, "layer": {**raw["layer"], name.removeprefix("layer."): other(name, default)}}
            try:
                said = "" if form.read_config(changed, config_class) != before else "the same config"
            except ValueError as refusal:
                said = str(refusal)
            assert not said or f"{name} is {other(name, default)!r}" in said, (name, said)

    @pytest.mark.parametrize(
        ("raw", "name"),
        [
            ({**CONFIG, "hyena_window": 1}, "hyena_window"),
            ({**ORIGINAL, "mlp_window": 1}, "mlp_window"),
            ({**ORIGINAL, "layer": {**ORIGINAL["layer"], "window": 1}}, "layer.window"),
        ],
        ids=["published", "original", "layer"],
    )
    def test_a_field_that_nobody_knows_is_refused(self, raw, name):
        with pytest.raises(ValueError, match=f"^here: {name} is 1 in this hyenadna(-original)? checkpoint"):
            read_config(raw, ArchHyenaConfig, "here")

    @pytest.mark.parametrize("value", [4, 1, 2.0, None, True, "5", -5])
    def test_a_count_of_features_that_no_filter_has_is_refused(self, value):
        with pytest.raises(ValueError, match=f"emb_dim is {value!r} in this hyenadna checkpoint; allowed are"):
            from_native(NativeCheckpoint({**CONFIG, "emb_dim": value}, parameters()))

    @pytest.mark.parametrize("field", ["d_model", "vocab_size", "pad_vocab_size_multiple"])
    @pytest.mark.parametrize("value", [0, -8, 1.5, None, "12", [12]])
    def test_no_number_is_refused_by_its_field(self, field, value):
        with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r} in this hyenadna checkpoint; allowed")):
            from_native(NativeCheckpoint({**CONFIG, field: value}, parameters()))

    @pytest.mark.parametrize("fields", [{"order": 3}, {"filter_types": ["modal"]}, {"gated": True}], ids=str)
    def test_what_theirs_cannot_say_is_refused(self, fields):
        architecture = hf_archs.get_architecture("hyena")
        model = architecture.causal_lm_class(architecture.tiny_config(**fields))
        with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*hyenadna"):
            to_native(model)

    def test_another_architecture_is_refused(self, tmp_path):
        PreTrainedConfig().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
        with pytest.raises(ValueError, match="reads hf_archs_hyena, hyenadna and hyenadna-original"):
            ArchHyenaForCausalLM.from_pretrained(tmp_path)


class _Anything:
    """An object of a class that reading weights must not import."""


@pytest.fixture
def lightning(monkeypatch):
    """Entries of PyTorch Lightning beside the weights: settings and states of its own classes and OmegaConf's."""

    def made(path):
        module, _, name = path.rpartition(".")
        for end in range(len(module.split(".")), 0, -1):
            part = ".".join(module.split(".")[:end])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
                sys.modules[part].__path__ = []
        cls = type(name, (_Anything,), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
        return cls

    settings, node = made("omegaconf.dictconfig.DictConfig"), made("omegaconf.nodes.AnyNode")
    hyper = settings()
    hyper.__dict__.update(_content={"d_model": node()}, _cache=defaultdict(dict, {"eval": {}}), _type=int)
    return {
        "epoch": 3,
        "hparams_name": "config",
        "hparams_type": settings,
        "hyper_parameters": hyper,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "callbacks": {made("pytorch_lightning.callbacks.ModelCheckpoint"): {"best_model_path": "x"}},
    }


class TestOriginal:
    """Repositories in the layout of HyenaDNA's own code, with a checkpoint of PyTorch Lightning."""

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_read_from_a_pickle(self, checkpointed, lightning, ids, tmp_path):
        state = parameters()
        folder = write_original(tmp_path / "published", {"state_dict": original(state, checkpointed), **lightning})
        read, info = ArchHyenaForCausalLM.from_pretrained(folder, use_safetensors=False, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert_close(logits(read, ids), by_the_papers(state, ids), "float32", 2e-5)
        assert read.config.name_or_path == str(folder)
        assert (read.config.hidden_size, read.config.vocab_size, read.config.pad_token_id) == (12, 16, 4)
        base = ArchHyenaModel.from_pretrained(folder, use_safetensors=False, num_labels=3)
        assert base.config.num_labels == 3
        read.save_pretrained(tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(logits(again, ids), logits(read, ids))

    def test_only_on_request(self, tmp_path):
        folder = write_original(tmp_path / "published", {"state_dict": original(parameters())})
        for kwargs in ({}, {"use_safetensors": True}):
            with pytest.raises(ValueError, match=r"are a pickle, weights\.ckpt, .*use_safetensors=False.*--pickle"):
                ArchHyenaForCausalLM.from_pretrained(folder, **kwargs)

    @pytest.mark.parametrize("change", ["missing", "more", "shape"])
    def test_weights_that_do_not_fit(self, change, tmp_path):
        state = original(parameters())
        name = "model.backbone.layers.1.mlp.fc1.weight"
        state |= {
            "missing": {},
            "more": {name.replace("fc1", "fc3"): torch.zeros(1)},
            "shape": {name: torch.zeros(2, 2)},
        }[change]
        if change == "missing":
            del state[name]
        folder = write_original(tmp_path / "published", {"state_dict": state})
        wrong = {"missing": "up_proj.*is missing in", "more": "fc3.* stands in", "shape": "up_proj.* has shape .* in"}
        with pytest.raises(RuntimeError, match=f"{wrong[change]} {folder}"):
            ArchHyenaForCausalLM.from_pretrained(folder, use_safetensors=False)

    def test_converted_by_the_command_line(self, ids, tmp_path):
        state = parameters()
        folder = write_original(tmp_path / "published", {"state_dict": original(state)})
        with pytest.raises(ValueError, match="--pickle"):
            cli.convert(str(folder), tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        cli.convert(str(folder), tmp_path / "ours", pickle=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert_close(logits(model, ids), by_the_papers(state, ids), "float32", 2e-5)

    def test_its_own_options(self, ids):
        """The config sets norms, window, short filter and frequency, which are fixed in the other layout."""
        config = {**ORIGINAL, "layer_norm_epsilon": 0.1, "layer": {**ORIGINAL["layer"], "shift": 0.3}}
        config["layer"]["short_filter_order"] = 4
        state = {
            name: torch.randn(36, 1, 4) if name.endswith("short_filter.weight") else tensor
            for name, tensor in parameters().items()
        }
        model = from_native(NativeCheckpoint(config, original(state)))
        expected = by_the_papers(state, ids, eps=0.1, shift=0.3)
        assert_close(logits(model, ids), expected, "float32", 2e-5)
        back = to_native(model)  # the other layout cannot represent it
        assert back.config["layer"]["shift"] == 0.3
        again = from_native(back)
        assert torch.equal(logits(again, ids), logits(model, ids))
        written = {"model." + name: tensor for name, tensor in back.state_dict.items()}
        for name, tensor in original(state).items():
            if not name.endswith((".3.freq", ".5.freq", "torchmetrics.count")):
                assert torch.equal(written[name], tensor), name

    def test_another_mixer_is_refused(self):
        config = {**ORIGINAL, "layer": {"_name_": "mha", "l_max": 66}}
        with pytest.raises(ValueError, match=r"layer\._name_ is 'mha' in this hyenadna-original checkpoint"):
            ArchHyenaConfig.from_dict(read_config(config, ArchHyenaConfig, "here"))

    @pytest.mark.parametrize("missing", ["vocab_size", "l_max"])
    def test_a_missing_size_is_refused(self, missing):
        config = {**ORIGINAL, "layer": {k: v for k, v in ORIGINAL["layer"].items() if k != missing}}
        config.pop(missing, None)
        with pytest.raises(ValueError, match=f"{missing} is None in this hyenadna-original checkpoint; allowed"):
            read_config(config, ArchHyenaConfig, "here")


class TestTokenizer:
    def test_ids_are_those_of_hyenadna(self):
        tokenizer = dna_tokenizer()
        assert tokenizer("ACGTN").input_ids == [7, 8, 9, 10, 11]
        assert tokenizer("acgtn").input_ids == [7, 8, 9, 10, 11]
        assert tokenizer("AC\nGT\n").input_ids == [7, 8, 9, 10]
        assert tokenizer("AXR").input_ids == [7, 6, 6]
        special = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
        assert tokenizer.convert_tokens_to_ids(special) == list(range(7))
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (4, 2, 1)
        assert len(tokenizer) == 12

    def test_pads_and_separators(self):
        tokenizer = dna_tokenizer(add_sep=True, model_max_length=6)
        batch = tokenizer(["ACGT", "A"], padding=True)
        assert batch.input_ids == [[7, 8, 9, 10, 1], [4, 4, 4, 7, 1]]
        assert batch.attention_mask == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
        assert tokenizer("ACGTACGTACGT", truncation=True).input_ids == [7, 8, 9, 10, 7, 1]

    def test_back_to_text(self):
        tokenizer = dna_tokenizer(add_sep=True)
        assert tokenizer.decode(tokenizer("acgtn").input_ids, skip_special_tokens=True) == "ACGTN"

    def test_loads_without_code_of_ours(self, tmp_path):
        tokenizer = dna_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))
        found = AutoTokenizer.from_pretrained(tmp_path)
        assert found("ACGTNX").input_ids == tokenizer("ACGTNX").input_ids
        assert found.padding_side == "left"
        assert found.get_vocab() == tokenizer.get_vocab()

    def test_beside_a_model(self, tmp_path):
        """The named sizes have the tokenizer's special tokens, and a row for each of its tokens."""
        architecture = hf_archs.get_architecture("hyena")
        tokenizer = dna_tokenizer()
        for name in ("tiny-1k", "large-1m"):
            config = architecture.config_class(**architecture.sizes[name])
            assert config.vocab_size >= len(tokenizer)
            for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
                assert getattr(config, token) == getattr(tokenizer, token)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).eos_token_id == tokenizer.eos_token_id
