"""The quickstart jobs on text and on DNA."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_archs.commands import loading, publish
from hf_archs.commands.progress import working
from hf_archs.commands.quickstart.figures import (
    command_of,
    draw,
    genome_table,
    in_bits,
    prompts_of,
    text_cards,
    text_table,
    where_it_ran,
)
from hf_archs.commands.quickstart.models import generate, new_model, prepare, save, share, to_device
from hf_archs.commands.quickstart.options import GenomeOptions, TextOptions, label_of
from hf_archs.commands.quickstart.run import going_on
from hf_archs.commands.quickstart.training import train_rows
from hf_archs.data import dna, text
from hf_archs.data.sources import read_corpus
from hf_archs.training import add_lora

MERGE_TOLERANCE = 1e-4  # relative to the largest logit: float32 rounds W x + B A x and (W + B A) x differently
ENGLISH_PROMPT = "The function returns"
SAMPLE = 2**17  # characters of each held-out set that are measured without --full


def run_text(options: TextOptions, console: Console) -> dict[str, Any]:
    """Run the main job and return its summary, which is also ``summary.json``.

    1. A tokenizer and a small model are trained on the corpus, without its held-out documents.
    2. A LoRA adapter is trained on English, the topics of Python's ``help()``.
    3. Text is generated with and without the adapter, and merging the adapter is checked to keep the logits.
    4. Model, tokenizer, adapter and cards are pushed to a Hub.
    5. They are pulled into an empty cache, and their logits are compared with those of the pushed models.
    6. A table is printed; ``loss.png``, ``model/`` (before LoRA), ``adapter/`` and ``summary.json`` are written.
    """
    config, parameters, repository = prepare(options, {})
    with working(f"reading {options.data}"):
        code, held_out_code = text.split(read_corpus(options.data))
        english, held_out_english = text.split(text.read_corpus("topics"))
        data = json.dumps([code, held_out_code]).encode()
    held_out = {"code": held_out_code, "english": held_out_english}
    measured = held_out if options.full else {name: text.sample(texts, SAMPLE) for name, texts in held_out.items()}
    characters = {name: {"measured": _size(measured[name]), "held_out": _size(held_out[name])} for name in held_out}

    with going_on(options, data, console) as run:
        labels = {"code": label_of(options.data), "english": "English"}

        def load() -> Any:
            return to_device(AutoModelForCausalLM.from_pretrained(run.folder / "model"))

        def measure(name: str, model: Any, what: str) -> float:
            with working(f"measuring {what} on held-out {labels[name]}") as bar:
                return text.bits_per_byte(model, tokenizer, measured[name].values(), progress=bar)

        def train(stage: str, model: Any, texts: Mapping[str, str], steps: int, rate: float) -> dict[str, Any]:
            with working(f"encoding the text for {stage}") as bar:
                # 16 characters for each token that the steps will read are enough text; encode no more
                enough = text.sample(texts, 16 * steps * options.batch * options.block, longest=_size(texts))
                rows = text.token_blocks(tokenizer, enough.values(), options.block, bar)
            trained = train_rows(run.folder / stage, options, model, tokenizer, rows, steps, rate)
            return {**trained, "bytes_per_token": _bytes_per_token(tokenizer, rows)}

        console.print(f"[bold]1[/] tokenizer and {options.arch} of {parameters:,} parameters on {escape(options.data)}")

        def train_tokenizer() -> None:
            with working("training the tokenizer"):
                save(run.folder / "tokenizer", text.train_tokenizer(code.values(), config.vocab_size))

        run.once("tokenizer", train_tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
        untrained = run.once(
            "figures before", lambda: measure("code", new_model(config, options.seed), "the untrained model")
        )

        def pretrain() -> dict[str, Any]:
            model = new_model(config, options.seed)
            trained = train("pretraining", model, code, options.steps, options.learning_rate)
            save(run.folder / "model", model, tokenizer)
            return trained

        pretrained = run.once("model", pretrain)
        model = load()
        after = run.once("figures after", lambda: {name: measure(name, model, "the model") for name in labels})
        samples = {"model": run.once("text", lambda: generate(model, tokenizer, prompts_of(options)[0], options.seed))}
        prompt = next(iter(held_out_english.values()))[:500]
        tokens = torch.tensor([text.encode(tokenizer, prompt)])
        pushed = {"model": publish.logits(model, tokens)}

        console.print("[bold]2[/] LoRA on English")

        def adapt() -> dict[str, Any]:
            set_seed(options.seed)
            adapted = add_lora(load(), rank=32, alpha=128)
            trained = train("LoRA", adapted, english, options.lora_steps, options.lora_learning_rate)
            save(run.folder / "adapter", adapted)
            about = run.folder / "adapter" / "adapter_config.json"
            # where the model lies after the run
            base = {"base_model_name_or_path": str((run.output / "model").resolve())}
            about.write_text(json.dumps(json.loads(about.read_text()) | base, indent=2), encoding="utf-8")
            return trained

        adapter = run.once("adapter", adapt)
        model = loading.load_adapter(model, str((run.folder / "adapter").resolve()))
        with_lora = run.once(
            "figures with LoRA", lambda: {name: measure(name, model, "the adapter") for name in labels}
        )
        pushed["adapter"] = publish.logits(model, tokens)
        bits = {
            "code": {"before": untrained, "after": after["code"], "after_lora": with_lora["code"]},
            "english": {"before_lora": after["english"], "after_lora": with_lora["english"]},
        }

        console.print("[bold]3[/] generated text")
        samples["adapter"] = run.once(
            "text with LoRA", lambda: generate(model, tokenizer, ENGLISH_PROMPT, options.seed)
        )
        for sample in samples.values():
            console.print(sample, style="dim", markup=False, highlight=False)
        merged = publish.logits(model.merge_and_unload(safe_merge=False), tokens)
        difference = (merged - pushed["adapter"]).abs().max().item()
        agrees = difference <= MERGE_TOLERANCE * pushed["adapter"].abs().max().item()

        summary = {
            "arch": options.arch,
            "parameters": parameters,
            "seconds": 0.0,  # set by `Run.finish`
            "tokens_per_second": pretrained["tokens_per_second"],
            "data": options.data,
            "bits_per_byte": bits,
            "characters": characters,
            "merged_equals_unmerged": agrees,
            "merged_largest_difference": difference,
            **share(run, repository, prompt, tokens, pushed, text_cards(options, bits, characters)),
            "steps": {"code": options.steps, "lora": options.lora_steps},
            "losses": {"code": pretrained["losses"], "lora": adapter["losses"]},
            "bytes_per_token": {"code": pretrained["bytes_per_token"], "lora": adapter["bytes_per_token"]},
            "samples": samples,
            **where_it_ran(),
        }
        curves = {f"pretraining on {labels['code']}": pretrained, "LoRA on English": adapter}
        draw({what: in_bits(t["losses"], t["bytes_per_token"]) for what, t in curves.items()}, "byte", run.folder)
        return run.finish(summary, text_table)


def _size(texts: Mapping[str, str]) -> int:
    return sum(map(len, texts.values()))


def _bytes_per_token(tokenizer: PreTrainedTokenizerBase, rows: Any) -> float:
    """The mean bytes per token of at most 256 rows, evenly spaced."""
    some = [rows[i]["input_ids"] for i in range(0, len(rows), math.ceil(len(rows) / 256))]
    size = sum(len(str(tokenizer.decode(row, skip_special_tokens=True)).encode()) for row in some)
    return size / sum(map(len, some))


def run_genome(options: GenomeOptions, console: Console) -> dict[str, Any]:
    """Train on DNA, and compare with Markov models fitted on the same bases.

    The model is trained on both strands of the first nine tenths of the bases, and measured on all other bases, in
    windows that each start from an empty context. It is pushed to a Hub and pulled into an empty cache, where its
    logits must be the same.
    """
    tokenizer = dna.dna_tokenizer(add_bos=True)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config, parameters, repository = prepare(options, {"vocab_size": len(tokenizer), **special})
    with working(f"reading {options.data}"):
        bases, held_out = dna.split(dna.read_fasta(options.data))
        rows = dna.Windows(bases, options.block, options.steps * options.batch, options.seed)

    with going_on(options, np.concatenate([bases, held_out]).tobytes(), console) as run:
        console.print(f"[bold]1[/] Markov models on {len(bases):,} bases")

        def fit(order: int) -> float:
            with working(f"counting for the Markov model of order {order}"):
                return dna.markov_bits(bases, held_out, order)

        markov = run.once("Markov models", lambda: {str(order): fit(order) for order in range(1, 13)})
        console.print(f"[bold]2[/] {options.arch} of {parameters:,} parameters on both strands of the bases")

        def pretrain() -> dict[str, Any]:
            model = new_model(config, options.seed)
            scratch = run.folder / "pretraining"
            trained = train_rows(scratch, options, model, tokenizer, rows, options.steps, options.learning_rate)
            save(run.folder / "model", model, tokenizer)
            return trained

        pretrained = run.once("model", pretrain)
        model = to_device(AutoModelForCausalLM.from_pretrained(run.folder / "model"))

        def measure() -> float:
            with working("measuring the model on held-out bases") as bar:
                return dna.bits_per_base(model, held_out, options.block, progress=bar)

        bits = {"model": run.once("figures after", measure), "best_markov": min(markov.values()), "markov": markov}
        prompt = "".join(dna.BASES[base] for base in held_out[:500])
        tokens = torch.tensor([text.encode(tokenizer, prompt)])
        pushed = {"model": publish.logits(model, tokens)}

        console.print("[bold]3[/] generated bases")
        sample = run.once("bases", lambda: generate(model, tokenizer, prompt[:60], options.seed))
        console.print(sample, style="dim", markup=False, highlight=False)
        card = {
            "training": f"{options.steps:,} steps of {options.batch} x {options.block} bases, from both strands of "
            f"`{Path(options.data).name}`, by {command_of(options)}. A demonstration: too small to be of use.",
            "results": {
                "held-out bases": f"{bits['model']:.3f} bits per base",
                "best Markov model (fitted on the training bases)": f"{bits['best_markov']:.3f} bits per base",
            },
            "prompt": prompt[:20],
        }
        summary = {
            "arch": options.arch,
            "task": options.task,
            "parameters": parameters,
            "seconds": 0.0,  # set by `Run.finish`
            "tokens_per_second": pretrained["tokens_per_second"],
            "data": options.data,
            "bits_per_base": bits,
            "bases": {"trained_on": len(bases), "held_out": len(held_out)},
            **share(run, repository, prompt, tokens, pushed, {"model": card}),
            "steps": options.steps,
            "losses": pretrained["losses"],
            "samples": {"model": sample},
            **where_it_ran(),
        }
        draw({"pretraining": in_bits(pretrained["losses"], 1)}, "base", run.folder)
        return run.finish(summary, genome_table)
