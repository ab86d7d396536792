"""The command line, ``hf-archs``: thin over the library. A wrong input ends with one sentence and status 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_archs import errors

app = typer.Typer(
    name="hf-archs",
    help="Architectures beyond the Transformer as ordinary models of the Hugging Face libraries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()

Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A config field; may be repeated.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")]


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    """``field=value`` pairs; a value is JSON where it can be, and text otherwise."""
    fields = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set is {pair!r}; allowed is FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


@app.command("list")
def list_architectures() -> None:
    """List the architectures, their sizes and what they can read."""
    from hf_archs import registry

    table = Table("architecture", "model type", "sizes", "native checkpoints", "LoRA on")
    for name in registry.architectures():
        a = registry.get_architecture(name)
        formats = ", ".join(map(str, a.native_formats))
        table.add_row(name, a.model_type, ", ".join(("tiny", *a.sizes)), formats, ", ".join(a.lora_targets))
    console.print(table)


@app.command()
def doctor() -> None:
    """Show versions, the device, which implementation every op uses, and plugins that failed. Status 1 if any did."""
    import importlib.metadata
    import platform

    import torch

    import hf_archs
    from hf_archs import backend, registry

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    table = Table("what", "found", title="hf-archs doctor", title_justify="left")
    table.add_row("hf-archs", hf_archs.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "huggingface-hub", "safetensors"):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    table.add_row("device", f"{device.type} ({name})")
    table.add_row("architectures", ", ".join(registry.architectures()))
    table.add_section()
    chosen = backend.backend_for(torch.empty(0, device=device))
    for op, forms in _implementations().items():
        table.add_row(f"op {op}", chosen if chosen in forms else "portable")
    table.add_section()
    failed = registry.failed_plugins()
    for plugin, why in failed.items():
        table.add_row(f"plugin {plugin}", f"[red]failed:[/] {why}")
    if not failed:
        table.add_row("plugins", "all loaded")
    console.print(table)
    if failed:
        raise typer.Exit(1)


def _implementations() -> dict[str, set[str]]:
    """Every op of hf_archs and the plugins, and its forms: an op ``x`` has ``x_portable.py`` and ``x_triton.py``."""
    import importlib.metadata
    import importlib.util

    from hf_archs import registry

    plugins = importlib.metadata.entry_points(group=registry.ENTRY_POINT_GROUP)
    ops: dict[str, set[str]] = {}
    for package in sorted({"hf_archs", *(plugin.module.partition(".")[0] for plugin in plugins)}):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for form in ("portable", "triton"):
                for file in sorted(Path(folder).rglob(f"*_{form}.py")):
                    ops.setdefault(file.stem.removesuffix(f"_{form}"), {"reference"}).add(form)
    return ops


@app.command()
def init(
    arch: Annotated[str, typer.Argument(help="Name of the architecture; see `hf-archs list`.")],
    output: Output,
    size: Annotated[str | None, typer.Option(help="One of the architecture's sizes, or tiny; else its first.")] = None,
    assign: Set = None,
    tokenizer: Annotated[str | None, typer.Option(help="Checkpoint whose tokenizer the model gets.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
) -> None:
    """Make a new model with random weights."""
    from transformers import set_seed

    from hf_archs import checkpoints, registry

    architecture = registry.get_architecture(arch)
    fields = _overrides(assign)
    chosen = None if tokenizer is None else checkpoints.load_tokenizer(tokenizer)
    if chosen is not None:
        fields.setdefault("vocab_size", len(chosen))
    config = checkpoints.sized_config(architecture, size, fields)
    parameters = checkpoints.check_memory(config)
    _check_free(output, overwrite)
    set_seed(seed)
    model = architecture.causal_lm_class(config)
    with checkpoints.replacing(output) as folder:
        model.save_pretrained(folder)
        if chosen is not None:
            chosen.save_pretrained(folder)
    console.print(f"{arch} of {parameters:,} parameters in {output}", highlight=False)


def _check_free(output: Path, overwrite: bool) -> None:
    if (output / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{str(output)!r} holds a checkpoint already; choose another folder, or pass --overwrite")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a model, or LoRA with --lora: hf-archs train MODEL --data TEXT --output_dir DIR [--lora] ...

    Every field of transformers.TrainingArguments is an option of its name; `hf-archs train --help` lists them.
    """
    from hf_archs import training

    own, arguments = training.parse(context.args)
    if checkpoint := training.checkpoint_to_continue(arguments):
        console.print(f"continuing from {checkpoint}; --resume_from_checkpoint false starts anew", highlight=False)
    results = training.train(own, arguments)
    console.print(
        f"training loss {results['train_loss']:.4f}, held-out text {results['bits_per_byte']:.4f} bits per byte; "
        f"written to {arguments.output_dir}",
        highlight=False,
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    adapter: Annotated[str | None, typer.Option(help="Folder or repository of a PEFT adapter.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a text; it is shown as it comes."""
    import torch
    from transformers import TextStreamer, set_seed

    from hf_archs import checkpoints, text

    tokenizer: Any
    loaded: Any = checkpoints.load_model(model)
    tokenizer = checkpoints.load_tokenizer(model)
    if adapter is not None:
        loaded = checkpoints.load_adapter(loaded, adapter)
    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    set_seed(seed)
    loaded.eval().generate(
        torch.tensor([[text.start_token(tokenizer), *text.encode(tokenizer, prompt)]], device=loaded.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    output: Output,
    to: Annotated[str | None, typer.Option(help="Native model type, where one of ours can become several.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
) -> None:
    """Convert a native checkpoint to ours, or one of ours to a native one; the tokenizer goes along."""
    from transformers import PreTrainedConfig

    from hf_archs import checkpoints
    from hf_archs.conversion import to_native

    architecture, _ = checkpoints.read_config(source)
    raw, _ = PreTrainedConfig.get_config_dict(source)
    ours = raw.get("model_type") == architecture.model_type
    if to is not None and not ours:
        raise ValueError(f"--to is {to!r}, but {source!r} is native already and becomes {architecture.model_type}")
    _check_free(output, overwrite)
    model = checkpoints.load_model(source, dtype="auto")
    converted = to_native(model, to) if ours else model
    with checkpoints.replacing(output) as folder:
        converted.save_pretrained(folder)
        if checkpoints.has_tokenizer(source):
            checkpoints.load_tokenizer(source).save_pretrained(folder)
    console.print(f"{type(converted).__name__} in {output}", highlight=False)


@app.command()
def describe(
    config: Annotated[str, typer.Argument(help="Folder, Hub repository, config.json, or ARCH or ARCH:SIZE.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    assign: Set = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
) -> None:
    """Show what every layer is and costs, against the same model with attention everywhere."""
    from hf_archs import checkpoints
    from hf_archs import describe as costs

    described = checkpoints.described_config(config, _overrides(assign))
    layers = costs.layer_costs(described, length)
    attention = costs.attention_costs(described, length)
    table = Table(
        "layer", "mixer", "feed-forward", title=f"{described.model_type}, {length:,} tokens", title_justify="left"
    )
    for column in ("parameters", "active", "ops a token", "state, bytes"):
        table.add_column(column, justify="right")
    for i, cost in enumerate(layers):
        table.add_row(str(i), cost.mixer, cost.feed_forward, *costs.numbers(cost))
    table.add_section()
    table.add_row("all", "", "", *costs.numbers(costs.total(layers)))
    table.add_row("all", "attention everywhere", "", *costs.numbers(costs.total(attention)))
    console.print(table)
    if picture is not None:
        costs.draw(layers, attention, length, picture)
        console.print(f"drawn into {picture}", highlight=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a model with experts.")],
    data: Annotated[str, typer.Option(help="Text file, folder or dataset name.")],
    picture: Annotated[Path | None, typer.Option(help="PNG file to draw the heat map into.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many of the text's tokens to run.")] = 65536,
) -> None:
    """Show what the routers of a model do with a text: load, entropy, drops, correction of the scores."""
    from hf_archs import checkpoints, inspection, text

    loaded: Any = checkpoints.load_model(model)
    tokenizer = checkpoints.load_tokenizer(model)
    length = min(512, tokens)
    rows = text.token_blocks(tokenizer, text.read_corpus(data).values(), length).with_format("torch")
    figures = inspection.router_figures(
        loaded.eval(), (rows[i]["input_ids"][None] for i in range(min(len(rows), tokens // length)))
    )
    table = Table("layer", "busiest expert", "its load over the mean", "entropy", "dropped")
    for layer, found in figures.items():
        numbers = f"{found['max_load']:.2f}", f"{found['entropy']:.3f}", f"{found['drop_rate']:.1%}"
        table.add_row(str(layer), str(int(found["load"].argmax())), *numbers)
    console.print(table)
    if picture is not None:
        inspection.draw(figures, picture)
        console.print(f"drawn into {picture}", highlight=False)


@app.command()
def bench(
    kinds: Annotated[list[str] | None, typer.Argument(help="ops, models, or both (the default).")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Architecture; may be repeated. Else all.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for machine and results.")] = None,
) -> None:
    """Compare ops and whole models with their peers in one run, on the device there is: medians of ratios."""
    import torch

    from hf_archs import bench as benchmark

    unknown = set(kinds or ()) - {"ops", "models"}
    if unknown:
        raise ValueError(f"bench: {min(unknown)!r} is no kind of measure; allowed are ops and models")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    results = []
    for kind in kinds or ("ops", "models"):
        results += benchmark.run(
            benchmark.measures(kind, device, arch), device, lambda r: console.print(str(r), highlight=False)
        )
    if output is not None:
        benchmark.write(results, device, output)


@app.command()
def quickstart(
    arch: Annotated[str, typer.Option(help="Name of the architecture.")] = "mamba",
    task: Annotated[str, typer.Option(help="text, or genome: DNA, compared with Markov models.")] = "text",
    size: Annotated[str | None, typer.Option(help="One of its sizes, or tiny; else the task's, or its first.")] = None,
    assign: Set = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the pretraining.")] = None,
    lora_steps: Annotated[int | None, typer.Option(help="Steps of LoRA.")] = None,
    data: Annotated[str | None, typer.Option(help="Text file, folder or dataset; or a FASTA file.")] = None,
    output: Output = Path("quickstart"),
    hub: Annotated[bool, typer.Option("--hub", help="Push to huggingface.co, not to an embedded Hub.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see what is pushed.")] = False,
    batch: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train a tokenizer and a model, adapt it with LoRA (or train on DNA), generate, push, pull and compare."""
    from hf_archs import quickstart as job

    options = job.make_options(
        task,
        arch=arch,
        size=size,
        overrides=_overrides(assign),
        steps=steps,
        lora_steps=lora_steps,
        data=data,
        output=str(output),
        hub=hub,
        public=public,
        batch=batch,
        block=block,
        seed=seed,
    )
    job.quickstart(options, console)


def _only_ours() -> None:
    """Leave the telling to this program: no reports on loading, no retries one by one (HF_ARCHS_DEBUG shows them)."""
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    hub_logging.set_verbosity(hub_logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading and saving; training and downloads have their own


def _use_all_cores() -> None:
    """One thread for each core: on some virtual machines torch takes two cores for one and starts one thread."""
    import psutil
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):  # fewer may be allowed to this process
        cores = min(cores, len(os.sched_getaffinity(0)))
    torch.set_num_threads(max(cores, torch.get_num_threads()))


def main() -> None:
    """Run the command line; an expected error ends with its sentence on stderr and status 2."""
    if not os.environ.get("HF_ARCHS_DEBUG"):
        _only_ours()
    _use_all_cores()
    try:
        app()
    except errors.EXPECTED as error:
        sys.exit(errors.report(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
