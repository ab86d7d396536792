"""The generated card of a model, beside saved weights and on a Hub; it replaces no written card."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import LlamaConfig

import hf_archs
from hf_archs.native import disk
from hf_archs.native.model_card import automatic_card, is_automatic
from hf_archs.testing.hub import EmbeddedHub

TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
WRITTEN = "---\nlicense: mit\n---\n# Mine\n\nIt reads.\n"


def tiny(name="mamba", **fields):
    architecture = hf_archs.get_architecture(name)
    return architecture.causal_lm_class(architecture.tiny_config(**fields))


@pytest.mark.parametrize("auto", TASKS)
def test_beside_saved_weights(auto, tmp_path):
    """It has tags, package and task, and code that runs."""
    architecture = hf_archs.get_architecture("mamba")
    _, model_class = architecture.auto_classes()[auto]
    model = model_class(architecture.tiny_config(bidirectional="MaskedLM" in auto))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": TASKS[auto],
        "tags": ["hf-archs", "mamba"],
    }
    assert "pip install hf-archs" in card.text
    assert f"`{model_class.__name__}`) of {model.num_parameters():,} parameters" in card.text
    code = card.text.split("```python")[1].split("```")[0].replace("this/folder", str(tmp_path))
    names = {}
    exec(code, names)
    assert type(names["model"]) is model_class


def test_it_follows_the_model_until_somebody_writes(tmp_path):
    tiny().save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    assert is_automatic(first)
    tiny("retnet").save_pretrained(tmp_path)
    second = (tmp_path / "README.md").read_text()
    assert "retnet" in second
    assert "mamba" not in second
    for changed in (
        WRITTEN,
        "",
        "no metadata",
        "---\na: [\n---\n",
        second + "\nAnd more.",
        second.replace("tags:", "license: mit\ntags:"),
    ):
        (tmp_path / "README.md").write_text(changed)
        tiny().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == changed
        with disk.replacing(tmp_path) as partial:
            tiny().save_pretrained(partial)
        assert (tmp_path / "README.md").read_text() == changed
    (tmp_path / "README.md").write_text(second)
    with disk.replacing(tmp_path) as partial:
        tiny().save_pretrained(partial)
    assert (tmp_path / "README.md").read_text() == first


def test_tags_of_others_stay():
    card = automatic_card(tiny(), "alice/tiny", ["dna", "mamba"])
    assert card.data.tags == ["hf-archs", "mamba", "dna"]
    assert is_automatic(str(card))


def test_other_ranks_write_none(tmp_path):
    tiny().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_adapters_and_others_have_cards_of_their_own(tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that is newer than any
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18")
    model = tiny()
    model.add_adapter(LoraConfig())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    model = tiny()
    model.config = LlamaConfig()
    assert automatic_card(model) is None


def test_models_share_no_tags():
    first, second = tiny(), tiny()
    first.add_model_tags("mine")
    assert second.model_tags == ["hf-archs", "mamba"]


PUSHES = """
import hf_archs
from huggingface_hub import HfApi, ModelCard
from pathlib import Path
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
written = {written!r}
architecture = hf_archs.get_architecture("hyena")
model = architecture.causal_lm_class(architecture.tiny_config())
model.push_to_hub("alice/plain", tags=["dna"])
card = ModelCard.load("alice/plain")
assert card.data.tags == ["hf-archs", "hyena", "dna"], card.data.tags
assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
assert "pip install hf-archs" in card.text and "More Information Needed" not in card.text
names = {{}}
exec(card.text.split("```python")[1].split("```")[0], names)
assert type(names["model"]) is type(model) and names["model"].config.name_or_path == "alice/plain"

# another model in its place: another card, with the tags of the first
retnet = hf_archs.get_architecture("retnet")
retnet.model_class(retnet.tiny_config()).push_to_hub("alice/plain")
card = ModelCard.load("alice/plain")
assert "retnet" in card.text and "dna" in card.data.tags and card.data.pipeline_tag == "feature-extraction"

# one that somebody wrote: only tags are added, as transformers does
ModelCard(written).push_to_hub("alice/plain")
model.push_to_hub("alice/plain")
card = ModelCard.load("alice/plain")
assert card.text == ModelCard(written).text and card.data.license == "mit", str(card)

# a tokenizer that came first has left transformers' empty card
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({{"a": 0}}, "a"))).push_to_hub("alice/tokenizer")
assert "More Information Needed" in ModelCard.load("alice/tokenizer").text
model.push_to_hub("alice/tokenizer")
assert "hyena language model" in ModelCard.load("alice/tokenizer").text

# by save_pretrained: with a card in the folder, and without
folder = Path("saved")
model.save_pretrained(folder, push_to_hub=True, repo_id="alice/saved")
assert 'from_pretrained("alice/saved")' in ModelCard.load("alice/saved").text
(folder / "README.md").write_text(written)
for _ in range(2):  # the second finds it on the Hub
    model.save_pretrained(folder, push_to_hub=True, repo_id="alice/written")
    card = ModelCard.load("alice/written")
    assert card.text == ModelCard(written).text and card.data.license == "mit", str(card)
    assert (folder / "README.md").read_text() == written
model.save_pretrained(folder, push_to_hub=True, repo_id="alice/saved")
assert (folder / "README.md").read_text() == written
print("pushed")
"""


def test_pushed(tmp_path):
    with EmbeddedHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "home") | {"PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", PUSHES.format(written=WRITTEN)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.endswith("pushed\n"), done.stderr
