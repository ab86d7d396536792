"""A plugin for version 0.1 runs, found through its entry point; warnings give the new places of names."""

import json
import os
import subprocess
import sys
from pathlib import Path

PLUGIN = Path(__file__).parent.parent / "data" / "plugin_of_0_1.py"
# each has a warning
NEW_PLACES = ("hf_archs.parts", "hf_archs.config", "hf_archs.model", "mixer_class")

CODE = """
import json, sys, warnings
import torch

folder = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_archs
    said = [(w.category.__name__, str(w.message)) for w in caught if "hf_archs" in str(w.message)]
assert not hf_archs.failed_plugins(), hf_archs.failed_plugins()
warnings.simplefilter("error")
from hf_archs.cache import ArchDynamicCache
from hf_archs.testing.contract.models import assert_close, lively, logits, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

architecture = hf_archs.get_architecture("ema")
model = lively(architecture.causal_lm_class, architecture.tiny_config(num_hidden_layers=3))

optimizer = torch.optim.AdamW(hf_archs.parameter_groups(model), lr=1e-3)
model.train()
losses = []
for _ in range(3):
    loss = model(tokens(2, 16), labels=tokens(2, 16)).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
model.eval()

ids = tokens(1, 20)
cache = ArchDynamicCache(model.config)
pieces = [logits(model, piece, past_key_values=cache, use_cache=True) for piece in ids.split([7, 1, 12], 1)]
assert_close(torch.cat(pieces, 1), logits(model, ids), "in pieces")
cache.activate_past_recording()
logits(model, tokens(1, 4, seed=1), past_key_values=cache, use_cache=True, logits_to_keep=4)
cache.crop(-4)
after = logits(model, tokens(1, 4, seed=2), past_key_values=cache, use_cache=True)
assert_close(after, logits(model, torch.cat([ids, tokens(1, 4, seed=2)], 1))[:, 20:], "rolled back")
mask = torch.ones(1, 25, dtype=torch.long)
mask[:, :5] = 0
padded = torch.nn.functional.pad(ids, (5, 0))
assert_close(logits(model, padded, attention_mask=mask)[:, 5:], logits(model, ids), "padded")
kinds = {}, {"use_cache": False}, {"cache_implementation": "static"}
written, *others = [model.generate(ids, max_new_tokens=8, min_new_tokens=8, **kind) for kind in kinds]
assert all(torch.equal(other, written) for other in others)

model.save_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder)
assert type(again) is architecture.causal_lm_class
assert torch.equal(logits(again, ids), logits(model, ids))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
assert type(classifier) is architecture.sequence_classification_class
print(json.dumps(said))
"""


def test_it_runs_and_is_told_where_names_have_gone(tmp_path):
    info = tmp_path / "site" / "plugin_of_0_1-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-0-1\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_archs.plugins]\nema = plugin_of_0_1\n")
    (tmp_path / "site" / PLUGIN.name).write_text(PLUGIN.read_text())
    where = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": where},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    stub = (tmp_path / "model" / "load_with_hf_archs.py").read_text()
    assert "pip install plugin-of-0-1" in stub
    warned = [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]
    assert {category for category, _ in warned} <= {"DeprecationWarning", "FutureWarning"}, warned
    for place in NEW_PLACES:
        assert any(place in message for _, message in warned), f"{place} is in none of {warned}"
