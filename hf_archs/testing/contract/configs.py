"""Configs: every field is validated, and every field has an effect."""

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

import hf_archs
from hf_archs.registry import Architecture
from hf_archs.testing.contract.models import Contract, enliven, forward, logits, tokens
from hf_archs.training import callbacks

# errors of a config that refuses a value
REFUSED = (ValueError, StrictDataclassError)


def own_fields(config_class: type) -> dict[str, Any]:
    """The fields that the architecture and the core declare, without transformers' own, and their types."""
    declared = {
        name
        for base in config_class.__mro__
        if not issubclass(PreTrainedConfig, base)
        for name in vars(base).get("__annotations__", {})
    }
    return {field.name: field.type for field in dataclasses.fields(config_class) if field.name in declared}


def modes(config: Any) -> list[dict[str, Any]]:
    """Changes of other fields that may be needed for a field to have an effect: none, and each switch changed."""
    found: list[dict[str, Any]] = [{}]
    for field, hint in own_fields(type(config)).items():
        switches = [option for listed in options_of(hint) for option in (listed, *typing.get_args(listed)[:1])]
        if hint is bool or any(typing.get_origin(option) is typing.Literal for option in switches):
            found += [{field: value} for value in other_values(getattr(config, field), hint)]
    return found


def options_of(hint: Any) -> list[Any]:
    """The plain types of a union, or the type itself."""
    return (
        [*typing.get_args(hint)]
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else [hint]
    )


def other_values(value: Any, hint: Any) -> list[Any]:
    """Values other than ``value`` that the field may allow, small changes first."""
    found: list[Any] = []
    for option in options_of(hint):
        if typing.get_origin(option) is typing.Literal:
            found += list(typing.get_args(option))
        elif option is bool:
            found += [True, False]
        elif option is int:
            whole = value if isinstance(value, int) else 2
            found += [whole + 1, whole - 1, whole * 2, whole // 2, 1, 3, 64]
        elif option is float:
            start = value if isinstance(value, float) and math.isfinite(value) else 1.0
            found += [start * 2, start / 2, start * 100, start / 100, 0.0, 1.0]
        elif option is str and value is None:
            found += ["none"]  # an empty pattern
        elif option is type(None):
            found += [None]
        elif option is str and isinstance(value, str):
            words = value.replace("+", " ").split()  # the words of a layer pattern, or the name of an activation
            found += [" ".join(reversed(words)), words[0], "relu"]
        elif typing.get_origin(option) is dict and isinstance(value, dict):
            # named instances: change one value inside
            for key, item in value.items():
                inner = dict[str, Any] if isinstance(item, dict) else type(item)
                found += [{**value, key: other} for other in other_values(item, inner)]
        elif typing.get_origin(option) in (tuple, list) and isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                inner = typing.get_args(option)[0]
                found += [(*value[:i], other, *value[i + 1 :]) for other in other_values(item, inner)]
        elif typing.get_origin(option) is list and not value:
            found += [[item] for item in other_values(1, typing.get_args(option)[0])]
    return [other for other in found if other != value or type(other) is not type(value)]


def wrong_values(hint: Any) -> list[Any]:
    """Values that no field of this type accepts."""
    options = options_of(hint)
    found: list[Any] = [object()]
    if str not in options:
        found.append("nonsense")
    if int in options:
        found += [-7, 2**62, 1.5]
    if float in options:
        found += [float("nan"), -1.0, 1e30]
    if bool in options:
        found += [3]
    return found


class ConfigContract(Contract):
    """Promises about configs."""

    def test_every_field_is_read(self, architecture: Architecture) -> None:
        """Another value of each field changes the model: its tensors, its logits in float32 or bf16, or generation."""
        config = architecture.tiny_config()
        unread = own_fields(type(config))
        for mode in modes(config):
            plain = self._fingerprint(architecture, mode)
            unread = {
                field: hint
                for field, hint in unread.items()
                if field in mode or not self._matters(architecture, field, hint, mode, plain)
            }
        assert not unread, f"nothing reads {', '.join(unread)}"

    @classmethod
    def _matters(cls, architecture: Architecture, field: str, hint: Any, mode: dict[str, Any], plain: Any) -> bool:
        for value in other_values(getattr(architecture.tiny_config(), field), hint):
            try:
                architecture.tiny_config(**mode, **{field: value})
            except REFUSED:
                continue
            if cls._fingerprint(architecture, {**mode, field: value}) != plain:
                return True
        return False

    @staticmethod
    def _fingerprint(architecture: Architecture, fields: dict[str, Any]) -> list[Any]:
        """All results that a config can change, in a form that can be compared."""
        prints: list[Any] = []
        for model_class in (architecture.causal_lm_class, architecture.sequence_classification_class):
            torch.manual_seed(0)
            try:
                model = model_class(architecture.tiny_config(**fields)).eval()
            except REFUSED as error:
                prints.append(str(error))
                continue
            prints.append([(name, tuple(t.shape), t.double().sum().item()) for name, t in model.state_dict().items()])
            prints.append([name for name, _ in model.named_parameters()])
            if model.can_generate():
                prints.append(sorted((k, str(v)) for k, v in model.generation_config.to_dict().items()))
            ids = tokens(1, 20) % min(model.config.vocab_size, 128)
            ids[0, -3:] = 1  # possible pads
            torch.manual_seed(0)
            out = forward(enliven(model), ids)
            prints.append([out.logits.double().sum().item(), sorted(out.keys())])
            # effects in training only: additional losses, noise, and updates between steps
            labels = {} if out.logits.ndim < 3 else {"labels": ids}
            torch.manual_seed(0)
            prints.append(model.train()(ids, **labels).get("loss", torch.zeros(())).double().sum().item())
            nothing: Any = None
            for callback in callbacks(model):
                callback.on_optimizer_step(nothing, nothing, nothing, model=model)
            prints.append([(name, tensor.double().sum().item()) for name, tensor in model.named_buffers()])
            prints.append(logits(model.eval().to(torch.bfloat16), ids).double().sum().item())
        return prints

    def test_every_field_is_validated(self, architecture: Architecture) -> None:
        """A value of the wrong type or far out of range is an error that names the field and the value."""
        for field, hint in own_fields(architecture.config_class).items():
            assert not isinstance(hint, str), f"{field}: its type is a string, which `strict` checks nothing against"
            for value in wrong_values(hint):
                try:
                    architecture.tiny_config(**{field: value})
                except REFUSED as error:
                    text = str(error)
                else:
                    pytest.fail(f"{field}={value!r} is accepted")
                assert field in text, text
                assert str(value) in text, text
                assert "allowed" in text or "expected" in text, text

    @pytest.mark.parametrize("name", ["hiden_size", "hidden_sizes", "num_layers", "rms_norm_eps", "tie_embeddings"])
    def test_a_misspelt_field(self, architecture: Architecture, name: str, tmp_path: Path) -> None:
        """A misspelt field is refused, in a file too, since it would silently have no effect."""
        with pytest.raises(
            ValueError, match=f"{architecture.config_class.__name__} has no field '{name}'; did you mean"
        ):
            architecture.tiny_config(**{name: 3})
        architecture.tiny_config().save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), name: 3}))
        with pytest.raises(ValueError, match=f"has no field '{name}'"):
            AutoConfig.from_pretrained(tmp_path)

    def test_a_misspelt_attribute(
        self, architecture: Architecture, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A misspelt attribute is not saved, so that a trained model can be loaded again, and a warning names it."""
        config = architecture.tiny_config()
        config.hidden_sizes, config.task_tag = 3, "a"
        config.save_pretrained(tmp_path)
        assert [
            "no field 'hidden_sizes', and it is not saved; did you mean hidden_size" in m for m in caplog.messages
        ] == [True]
        assert AutoConfig.from_pretrained(tmp_path).task_tag == "a"

    def test_fields_of_others_are_kept(
        self, architecture: Architecture, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fields of other tools are kept. Unknown fields of a newer release of this library give a warning."""
        theirs: dict[str, Any] = {"unsloth_version": "2026.1", "max_position_embeddings": 4096, "task_tag": {"a": [1]}}
        architecture.tiny_config(**theirs).save_pretrained(tmp_path)
        found = AutoConfig.from_pretrained(tmp_path)
        assert {name: getattr(found, name) for name in theirs} == theirs
        file = tmp_path / "config.json"
        saved = json.loads(file.read_text())
        assert saved["hf_archs_version"] == hf_archs.__version__
        assert not caplog.messages
        file.write_text(json.dumps({**saved, "hf_archs_version": "99.0", "hidden_sizes": 1}))
        AutoConfig.from_pretrained(tmp_path)
        assert ["hf-archs 99.0 wrote this" in said and "hidden_sizes" in said for said in caplog.messages] == [True]

    def test_saved_and_loaded(self, architecture: Architecture, tmp_path: Path) -> None:
        """Every field is read as it was saved, also with another value."""
        for field, hint in own_fields(architecture.config_class).items():
            for value in other_values(getattr(architecture.tiny_config(), field), hint):
                try:
                    config = architecture.tiny_config(**{field: value})
                except REFUSED:
                    continue
                config.save_pretrained(tmp_path)
                found = AutoConfig.from_pretrained(tmp_path)
                found._name_or_path = config._name_or_path
                assert type(found) is architecture.config_class
                assert found.to_dict() == config.to_dict()
                break

    @pytest.mark.parametrize("field", ["pad_token_id", "bos_token_id", "eos_token_id"])
    def test_token_ids(self, architecture: Architecture, field: str, tmp_path: Path) -> None:
        """Wrong token ids are refused when they are set, or before any file of the model is written."""
        model = architecture.causal_lm_class(architecture.tiny_config())
        values: list[Any] = [-1] if field != "eos_token_id" else [-2, [3, -1]]
        for value in values:
            with pytest.raises(REFUSED, match=rf"{field} is {re.escape(str(value))}; allowed are 0 to vocab_size - 1"):
                setattr(model.config, field, value)
        setattr(model.config, field, 128)
        with pytest.raises(REFUSED, match=rf"{field} is 128; allowed are 0 to vocab_size - 1 = 127, and None"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        setattr(model.config, field, None if field != "eos_token_id" else -1)  # -1: never, in transformers
        model.save_pretrained(tmp_path)
        assert getattr(AutoConfig.from_pretrained(tmp_path), field) == getattr(model.config, field)

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": 32},
            {"hidden_size": 128},
            {"num_hidden_layers": 1},
            {"num_hidden_layers": 3},
            {"vocab_size": 50},
        ],
        ids=str,
    )
    def test_tiny_config(self, architecture: Architecture, fields: dict[str, int]) -> None:
        """The tiny config is small enough for tests, and each of its three sizes can be changed alone."""
        config = architecture.tiny_config(**fields)
        assert config.vocab_size == fields.get("vocab_size", 128)
        assert config.hidden_size == fields.get("hidden_size", 64)
        assert config.num_hidden_layers == fields.get("num_hidden_layers", config.num_hidden_layers) <= 4
        model = architecture.causal_lm_class(config).eval()
        assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
        assert logits(model, tokens(1, 5) % config.vocab_size).isfinite().all()

    def test_named_sizes(self, architecture: Architecture) -> None:
        """Every size that ``hf-archs init`` offers is a valid config, and its model can be built."""
        for name, fields in architecture.sizes.items():
            with torch.device("meta"):
                model = architecture.causal_lm_class(architecture.config_class(**fields))
            assert sum(parameter.numel() for parameter in model.parameters()) > 400_000, name
