"""Settings of our classes for transformers' and PEFT's common tests (see ../shared/hf_suite).

``python tests/hf_suite_hooks.py mamba`` prints the variables for a shell; `environment` gives them to a program.
"""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any
from unittest.mock import ANY, patch

import hf_archs

# sizes of the common tests' tiny models, whose defaults suit attention; other fields are those of `tiny`
_CONFIG: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "head_dim": 8, "n_groups": 2},
    "retnet": {"num_heads": 2, "intermediate_size": 64},
    "hyena": {"max_positions": 64, "filter_size": 8, "intermediate_size": 64},
    "moe": {**hf_archs.get_architecture("moe").tiny, "mixer": {"type": "attention", "num_heads": 2}},
}
# merging needs untied embeddings, and layers at least as wide as its adapters' rank of 20
_PEFT: dict[str, dict[str, Any]] = {
    "mamba": {"tie_word_embeddings": False, "time_step_rank": 32},
    "mamba2": {"tie_word_embeddings": False},
    "retnet": {"tie_word_embeddings": False},
    "hyena": {"tie_word_embeddings": False},
    "moe": {"tie_word_embeddings": False},
    "hybrid": {"tie_word_embeddings": False},
}


class StateShapes:
    """Facts that the common tests lack: the shapes of the states, and that experts may have a gate or none."""

    model_tester: Any
    subTest: Any

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        assert len(past_key_values) == config.num_hidden_layers
        for layer_idx in range(config.num_hidden_layers):
            for name, spec in config.layer_plan(layer_idx).states().items():
                place = past_key_values.slot(layer_idx).places[name]
                # a growing state has a column for each token of the cache, or for each place of a static one
                shape = (batch_size, *(ANY if size is None else size for size in spec.shape))
                assert place.states[place.index].shape == shape

    def _check_attentions_for_generate(
        self,
        batch_size: int,
        attentions: Any,
        prompt_length: int,
        output_length: int,
        config: Any,
        decoder_past_key_values: Any,
    ) -> None:
        if not getattr(decoder_past_key_values, "is_static", False):
            return super()._check_attentions_for_generate(  # type: ignore[misc]
                batch_size, attentions, prompt_length, output_length, config, decoder_past_key_values
            )
        room = decoder_past_key_values.max_cache_len  # all columns of growing states, and possibly those of a forward
        for i, layers in enumerate(attentions):
            length = prompt_length if i == 0 else 1
            assert {w.shape for w in layers} <= {(batch_size, 2, length, n) for n in (length, room, room + length)}

    def test_reverse_loading_mapping(self) -> None:
        common = sys.modules["tests.test_modeling_common"]
        mapping = common.get_model_conversion_mapping

        def own(model: Any, **kwargs: Any) -> list[Any]:
            names = [name for name, _ in model.named_parameters()]
            conversions = mapping(model, **kwargs)
            # a conversion for reading only has no inverse, and changes no name in a written file
            written = [c for c in conversions if c.reverse_transform().target_patterns]
            return [c for c in written if any(name.endswith(c.target_patterns[0]) for name in names)]

        for gated in (True, False):
            self.model_tester.gated = gated
            with self.subTest(gated=gated), patch.object(common, "get_model_conversion_mapping", own):
                super().test_reverse_loading_mapping()  # type: ignore[misc]


def environment(name: str) -> dict[str, str]:
    """The variables of both suites for the architecture ``name``."""
    architecture = hf_archs.get_architecture(name)

    def spec(cls: type) -> str:
        return f"{cls.__module__.partition('.')[0]}:{cls.__name__}"

    overrides = _CONFIG.get(name, architecture.tiny)
    return {
        "HF_SUITE_CONFIG": spec(architecture.config_class),
        "HF_SUITE_BASE": spec(architecture.model_class),
        "HF_SUITE_CAUSAL": spec(architecture.causal_lm_class),
        "HF_SUITE_SEQCLS": spec(architecture.sequence_classification_class),
        "HF_SUITE_TOKCLS": spec(architecture.token_classification_class),
        "HF_SUITE_QA": spec(architecture.question_answering_class),
        "HF_SUITE_CONFIG_KWARGS": json.dumps(overrides),
        "HF_SUITE_TEST_ATTRS": json.dumps({"has_attentions": name == "moe"}),
        "HF_SUITE_CONFIG_TESTER_KWARGS": json.dumps({"common_properties": ["hidden_size", "num_hidden_layers"]}),
        "HF_SUITE_TEST_MIXIN": "hf_suite_hooks:StateShapes",
        "HF_SUITE_IMPORT": "hf_archs",
        # two tests expect a warning that the suite's default verbosity hides (for Llama too)
        "TRANSFORMERS_VERBOSITY": "warning",
        "PEFT_SUITE_CONFIG": spec(architecture.config_class),
        "PEFT_SUITE_CAUSAL": spec(architecture.causal_lm_class),
        "PEFT_SUITE_CONFIG_KWARGS": json.dumps(architecture.tiny_config(**_PEFT.get(name, {})).to_diff_dict()),
        "PEFT_SUITE_TARGETS": ",".join(architecture.lora_targets),
        "PEFT_SUITE_METHODS": "LoraConfig,IA3Config",
    }


if __name__ == "__main__":
    for key, value in environment(sys.argv[1]).items():
        print(f"export {key}={shlex.quote(value)}")
