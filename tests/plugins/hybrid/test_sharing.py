"""Layers that share a mixer or a feed-forward, each with its own low-rank part."""

import copy
import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_archs.model.shared_weights import SiteLinear
from hf_archs.testing.contract.generation import generate, greedy
from hf_archs.testing.contract.models import assert_close, gradients, lively, logits, tokens
from hf_archs_hybrid import ArchHybridConfig, ArchHybridForCausalLM


def config(rank=0, layers=4, **fields):
    return ArchHybridConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=layers,
        mixers={
            "ssm": {"type": "mamba2", "state_size": 16, "head_dim": 16},
            "common": {"type": "retnet", "num_heads": 4, "shared": True, "site_rank": rank},
        },
        layer_pattern="ssm common",
        feed_forward={"mlp": {"type": "mlp", "intermediate_size": 96, "shared": True, "site_rank": rank}},
        feed_forward_pattern="none mlp",
        **fields,
    )


@pytest.fixture(params=[0, 4], ids=["plain", "with parts of their own"])
def model(request):
    return lively(ArchHybridForCausalLM, config(request.param))


def test_one_set_of_weights(model):
    layers = model.model.layers
    assert layers[3].mixer is layers[1].mixer
    assert layers[3].feed_forward is layers[1].feed_forward
    assert layers[2].mixer is not layers[0].mixer
    assert layers[3].norm is not layers[1].norm


def test_unshared_copies_give_the_same():
    """Shared layers equal separate layers with copies of the weights, in results and in a training step."""
    shared = lively(ArchHybridForCausalLM, config())
    apart = copy.deepcopy(config())
    for named in (apart.mixers["common"], apart.feed_forward["mlp"]):
        named["shared"] = False
    own = ArchHybridForCausalLM(apart).eval()
    own.load_state_dict(shared.state_dict())
    ids = tokens(2, 19)
    assert torch.equal(logits(own, ids), logits(shared, ids))
    found, each = gradients(shared, shared(ids).logits.sum()), gradients(own, own(ids).logits.sum())
    copies = {name for name in each if name not in found}
    assert copies
    assert all(name.startswith(("model.layers.3.mixer.", "model.layers.3.feed_forward.")) for name in copies)
    for name, gradient in found.items():
        copy_of_it = name.replace("layers.1.", "layers.3.")
        both = each[name] + (each[copy_of_it] if copy_of_it in copies else 0)
        assert_close(gradient, both, name)


def test_saved_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any(n.startswith(("model.layers.3.mixer.", "model.layers.3.feed_forward.")) for n in names)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.model.layers[3].mixer is loaded.model.layers[1].mixer
    ids = tokens(2, 9)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_each_layer_has_its_own_part():
    model = lively(ArchHybridForCausalLM, config(4))
    ids = tokens(1, 9)
    before = logits(model, ids)
    linear = [m for m in model.modules() if isinstance(m, SiteLinear)]
    assert len(linear) == 5 + 3
    changes = []
    for site in (0, 1):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for m in changed.modules():
                if isinstance(m, SiteLinear):
                    m.site_up[site].zero_()
        changes.append(logits(changed, ids))
        assert (changes[-1] - before).abs().max() > 1e-2
    assert (changes[0] - changes[1]).abs().max() > 1e-2


def test_begins_as_the_shared_weights_alone():
    torch.manual_seed(0)
    plain = ArchHybridForCausalLM(config()).eval()
    sites = ArchHybridForCausalLM(config(4)).eval()
    missing, unexpected = sites.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".site_" in name for name in missing)
    assert torch.equal(logits(sites, tokens(1, 9)), logits(plain, tokens(1, 9)))


def test_states_are_each_layers_own(model):
    ids = tokens(2, 20)
    whole = logits(model, ids)
    with torch.no_grad():
        out = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=out.past_key_values)
    assert_close(rest.logits, whole[:, 9:], "continued")
    assert torch.equal(generate(model, ids), greedy(model, ids))


def test_lora_merges(model):
    """An adapter on a shared layer is on all layers that share it, and merging adds it once."""
    ids = tokens(2, 9)
    model.double()  # the random weights are large
    plain = logits(model, ids)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora).eval()
    for name, gradient in gradients(wrapped, wrapped(input_ids=ids, labels=ids).loss).items():
        assert gradient.abs().max() > 0, name
    expected = logits(wrapped, ids)
    assert (expected - plain).abs().max() > 1e-1
    assert_close(logits(wrapped.merge_and_unload(safe_merge=True), ids), expected, "merged", 1e-9)


def test_checkpointing_and_compile(model):
    ids = tokens(2, 19)
    model.train()
    plain = gradients(model, model(ids, labels=ids).loss)
    model.activation_checkpointing_enable()
    again = gradients(model, model(ids, labels=ids).loss)
    for name, gradient in plain.items():
        assert_close(again[name], gradient, name)
    model.activation_checkpointing_disable()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(ids).logits, model(ids).logits, "compiled")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pattern": "ssm+common"}, "layer 0 is 'ssm\\+common', where 'common' is shared"),
        ({"mixers": {"ssm": {"type": "mamba2", "shared": 3}}}, "'ssm': shared is 3; allowed are true and false"),
        ({"mixers": {"ssm": {"type": "mamba2", "site_rank": 3}}}, "site_rank is 3; allowed are 0 to 4096, and 0 where"),
    ],
)
def test_bad_input(fields, message):
    fields = {"layer_pattern": "ssm", **fields}
    with pytest.raises(ValueError, match=message):
        ArchHybridConfig(**{**config().to_diff_dict(), **fields})


@pytest.mark.torchao
@pytest.mark.parametrize("way", ["quantize_", "quantization_config"])
def test_int8_weights(model, way, tmp_path):
    """torchao walks from child to child and quantises a shared layer once; transformers skips shared layers, unless the
    modules to skip are given.
    """
    quantization = importlib.import_module("torchao.quantization")
    kind = quantization.Int8WeightOnlyConfig()
    ids, plain = tokens(2, 19), logits(model, tokens(2, 19))
    if way == "quantize_":
        quantization.quantize_(model, kind)
    else:
        model.save_pretrained(tmp_path / "plain")
        options = TorchAoConfig(kind, modules_to_not_convert=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=options)
        model.save_pretrained(tmp_path / "int8")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
        assert torch.equal(logits(again, ids), logits(model, ids))
        assert again.model.layers[3].mixer is again.model.layers[1].mixer
    layers = model.model.layers
    for projection in (layers[0].mixer.in_proj, layers[3].mixer.q_proj, layers[3].feed_forward.down_proj):
        assert type(projection.weight.data).__name__ == "Int8Tensor"
    assert 0 < (logits(model, ids) - plain).abs().max() < 0.3 * plain.abs().max()


def test_children_are_of_one_layer(model):
    """A walk from child to child visits every module of the model once."""
    met = []

    def go(module):
        met.append(module)
        for child in module.children():
            go(child)

    go(model)
    assert met == list(model.modules())
