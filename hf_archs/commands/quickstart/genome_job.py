"""The job on DNA."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hf_archs.commands import publish
from hf_archs.commands.progress import working
from hf_archs.commands.quickstart.cards import command_of
from hf_archs.commands.quickstart.figures import draw, genome_table, in_bits, where_it_ran
from hf_archs.commands.quickstart.models import generate, new_model, prepare, save, to_device
from hf_archs.commands.quickstart.options import GenomeOptions
from hf_archs.commands.quickstart.run import going_on
from hf_archs.commands.quickstart.sharing import share
from hf_archs.commands.quickstart.training import train_rows
from hf_archs.data import dna, text


def run_genome(options: GenomeOptions, console: Console) -> dict[str, Any]:
    """Train on DNA, and compare with Markov models fitted on the same bases.

    The first nine tenths of the bases are trained on, on both strands; all of the rest is scored, every window from an
    empty context. The model is pushed to a Hub, pulled into an empty cache, and its logits compared.
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
        console.print(f"[bold]2[/] {options.arch} of {parameters:,} parameters on both strands of them")

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
                "the best Markov model of them": f"{bits['best_markov']:.3f} bits per base",
            },
            "prompt": prompt[:20],
        }
        summary = {
            "arch": options.arch,
            "task": options.task,
            "parameters": parameters,
            "seconds": 0.0,
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
