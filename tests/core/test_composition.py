"""Layer patterns, and their named instances."""

import pytest

from hf_archs.config.pattern import expand_pattern
from hf_archs_hybrid import ArchHybridConfig

NAMES = ("ssm", "local", "attention")


def expand(pattern, layers=8):
    return ["+".join(entry) or "none" for entry in expand_pattern("layer_pattern", pattern, NAMES, layers)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("ssm", "ssm ssm ssm ssm ssm ssm ssm ssm"),
        ("ssm local", "ssm local ssm local ssm local ssm local"),
        ("ssm, local", "ssm local ssm local ssm local ssm local"),
        ("ssm*3 attention", "ssm ssm ssm attention ssm ssm ssm attention"),
        ("ssm; attention every 4", "ssm ssm ssm attention ssm ssm ssm attention"),
        ("ssm; attention every 8 from 4", "ssm ssm ssm ssm attention ssm ssm ssm"),
        ("ssm none; ssm+local every 4 from 1", "ssm ssm+local ssm none ssm ssm+local ssm none"),
        ("ssm; local every 2; attention every 4", "ssm local ssm attention ssm local ssm attention"),
        (["ssm"] * 6 + ["none", "local+attention"], "ssm ssm ssm ssm ssm ssm none local+attention"),
    ],
)
def test_patterns(pattern, expected):
    assert expand(pattern) == expected.split()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (["ssm"] * 5, "layer_pattern has 5 entries; allowed are num_hidden_layers = 8"),
        ("ssm locl", "layer_pattern has 'locl'; did you mean local?"),
        ("ssm+ssm", "layer_pattern has 'ssm\\+ssm'; allowed is each name once in a layer"),
        ("", "layer_pattern is ''; allowed are entries such as attention local ssm"),
        ("ssm*x", "layer_pattern has 'ssm\\*x'; allowed after \\* is how often"),
        ("ssm; every 8", "the rule 'every 8'; allowed is 'name every 8' or with 'from 4'"),
        ("ssm; local every 0", "the rule 'local every 0'"),
        ("ssm; locl every 2", "layer_pattern has 'locl'; did you mean local?"),
    ],
)
def test_patterns_that_are_none(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(pattern)


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ({"a": 3}, "mixer 'a' is 3; allowed is a dict with a 'type'"),
        ({"a": {"state_size": 8}}, "mixer 'a' is .*; allowed is a dict with a 'type'"),
        ({"a": {"type": "mamba3"}}, "mixer 'a': no mixer 'mamba3'; did you mean mamba or mamba2"),
        ({"a": {"type": "mamba2", "state": 8}}, "mixer 'a' has no field 'state'; did you mean state_size"),
        ({"a": {"type": "mamba2", "hidden_size": 8}}, "mixer 'a' has no field 'hidden_size'"),
        ({"a": {"type": "mamba2", "head_dim": 7}}, "mixer 'a': Mamba2MixerConfig: head_dim is 7; allowed are divisors"),
        ({"a": {"type": "mamba2", "head_dim": "x"}}, "mixer 'a': .*head_dim"),
        ({"a b": {"type": "mamba2"}}, "mixers has the name 'a b'; allowed are identifiers"),
        ({"none": {"type": "mamba2"}}, "mixers has the name 'none'"),
    ],
)
def test_instances_that_are_none(mixers, message):
    with pytest.raises(ValueError, match=message):
        ArchHybridConfig(mixers=mixers, layer_pattern="a")


def test_instances_follow_the_model():
    """One config object for all layers, made again if a field changes; it refers to the model's config."""
    config = ArchHybridConfig(mixers={"a": {"type": "mamba2"}}, layer_pattern="a", hidden_size=64, norm_eps=1e-3)
    first = config.layer_plan(0).mixer_config
    assert first is config.layer_plan(5).mixer_config
    assert first.model_config is config
    assert first.hidden_size == 64
    assert first.norm_eps == 1e-3
    config.mixers["a"]["expand"] = 4
    assert config.layer_plan(0).mixer_config.expand == 4
    again = ArchHybridConfig.from_dict(config.to_dict())
    assert again.layer_plan(0).mixer_config == config.layer_plan(0).mixer_config
    assert again.layer_plan(0).mixer_config.model_config is again


def test_several_feed_forwards_need_a_pattern():
    both = {"a": {"type": "mlp"}, "b": {"type": "mlp"}}
    with pytest.raises(ValueError, match="feed_forward_pattern is None; with a and b in feed_forward"):
        ArchHybridConfig(feed_forward=both)
    with pytest.raises(ValueError, match=r"feed_forward_pattern has 'a\+b'; allowed is one feed-forward in a layer"):
        ArchHybridConfig(feed_forward=both, feed_forward_pattern="a+b")
