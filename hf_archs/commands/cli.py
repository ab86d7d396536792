"""The command line, ``hf-archs``: a thin layer over the library. Wrong input ends with one sentence and status 2.

Importing torch takes seconds, so the library is imported inside the commands only. The program (``hf_archs_main``)
loads this file without its package, which imports torch: help and mistyped options are answered at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

app = typer.Typer(
    name="hf-archs",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()


class _Command(TyperCommand):
    """Checks the arguments first, and then prepares the process, since the preparation imports torch."""

    def invoke(self, ctx: Any) -> Any:
        if not os.environ.get("HF_ARCHS_DEBUG"):
            _silence_libraries()
        _use_all_cores()
        return super().invoke(ctx)


class _ShownCommand(_Command):
    """Shows a progress line during imports, with `progress.py`, which is loaded on its own like this file."""

    def invoke(self, ctx: Any) -> Any:
        import importlib.util

        spec = importlib.util.spec_from_file_location("hf_archs_progress", Path(__file__).with_name("progress.py"))
        assert spec is not None
        assert spec.loader is not None
        progress = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(progress)
        # A third of OpenMP's default: with it, training beside other processes is ten times slower, because waiting
        # threads hold the cores; without spinning, training on an idle machine is half as fast.
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")
        if ctx.params.get("size") == "tiny":
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # operators of tiny models gain nothing from a second thread
        with progress.working("importing torch, transformers and PEFT"):
            import hf_archs.commands.quickstart  # noqa: F401
        return super().invoke(ctx)


def _version(requested: bool) -> None:
    import importlib.metadata

    if requested:
        print(f"hf-archs {importlib.metadata.version('hf-archs')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Architectures beyond the Transformer, as ordinary models of the Hugging Face libraries."""


def _say(sentence: str) -> None:
    """Print a line without wrapping, so that paths stay whole, and without reading brackets as markup."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A config field; may be repeated.")]
OtherTokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Checkpoint to take the tokenizer from, if the model has none.")
]
Adapter = Annotated[str | None, typer.Option(help="Folder or repository of a PEFT adapter.")]
MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(min=1)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")]


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    """The values of ``field=value`` pairs, each parsed as JSON if it is valid JSON, and text otherwise."""
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


@app.command("list", cls=_Command)
def list_architectures() -> None:
    """List the architectures and the parts of hybrids."""
    from hf_archs.commands import overview, tables

    tables.show(overview.architectures(), console)
    tables.show(overview.parts(), console)


@app.command(cls=_Command)
def doctor() -> None:
    """Show versions, the device, the ops and the plugins.

    Versions are compared with the tested ones. The exit status is 1 if a package is missing, a version is not allowed,
    or a plugin failed.
    """
    from hf_archs.commands import doctor as installation

    if not installation.examine(console):
        raise typer.Exit(1)


@app.command(cls=_Command)
def init(
    arch: Annotated[str, typer.Argument(help="Name of the architecture; see `hf-archs list`.")],
    output: Output,
    size: Annotated[str | None, typer.Option(help="A size of the architecture, or tiny; by default its first.")] = None,
    assign: Set = None,
    tokenizer: Annotated[str | None, typer.Option(help="Checkpoint to take the tokenizer from.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
) -> None:
    """Create a model with random weights."""
    from hf_archs.commands import create

    _check_free(output, overwrite)
    parameters = create.init(arch, output, size, _overrides(assign), tokenizer, seed)
    _say(f"{arch} of {parameters:,} parameters in {output}")


def _check_free(output: Path, overwrite: bool) -> None:
    if (output / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{str(output)!r} holds a checkpoint already; choose another folder, or pass --overwrite")


@app.command(
    cls=_Command,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a model, or an adapter with --lora.

    hf-archs train MODEL --data DATA --output_dir DIR [--trainer NAME] [--lora [LAYER ...]] [--NAME VALUE ...]

    Every field of transformers.TrainingArguments is an option of the same name; `hf-archs train --help` lists them.
    With --trainer sft, dpo, grpo or reward it is TRL's trainer, with the options of TRL's config.
    """
    from hf_archs.commands import train as training

    own, arguments = training.parse(context.args)
    run = training.standing(arguments)
    for why in run.skipped:
        _say(f"skipping {why}")
    if run.finished:
        _say(
            f"already finished: {arguments.output_dir} holds the model after {run.steps:,} steps; a larger --max_steps "
            "or --num_train_epochs goes on, --resume_from_checkpoint false starts anew"
        )
        return
    if run.checkpoint is not None:
        _say(f"continuing from {run.checkpoint}; --resume_from_checkpoint false starts anew")
    elif run.skipped:
        _say("no checkpoint is whole: training starts anew")
    results = training.train(own, arguments, _say)
    _say(f"{training.described(results) or 'nothing left to train'}; written to {arguments.output_dir}")


@app.command(cls=_Command)
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    adapter: Adapter = None,
    tokenizer: OtherTokenizer = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.7,
    top_k: TopK = 50,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a text, and print it while it is generated."""
    from hf_archs.commands.generate import continue_text, sampling

    options = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_k)}
    continue_text(model, prompt, adapter, tokenizer, seed, **options)


@app.command(cls=_Command)
def chat(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a model with a chat template.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    adapter: Adapter = None,
    tokenizer: OtherTokenizer = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = 50,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Talk with a model. The state is kept between turns; /help lists /save, /load, /undo and the other commands."""
    from hf_archs.commands import chat as terminal
    from hf_archs.commands.generate import sampling

    options = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_k)}
    terminal.chat(model, adapter, tokenizer, system=system, seed=seed, **options)


@app.command(cls=_Command)
def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository; clients ask for it by this name.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default this machine's programs alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    state_bytes: Annotated[int, typer.Option(min=0, help="Most bytes of kept states of prompts.")] = 2**30,
    adapter: Adapter = None,
    tokenizer: OtherTokenizer = None,
) -> None:
    """Serve a model to OpenAI clients. It is transformers' own server, with a prefix cache of states."""
    from hf_archs.commands import serve as server

    server.serve(model, adapter, tokenizer, host, port, state_bytes)


@app.command(cls=_Command)
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    output: Output,
    to: Annotated[str | None, typer.Option(help="Native model type, if several are possible.")] = None,
    pickle: Annotated[bool, typer.Option("--pickle", help="Read weights from a pickle; nothing in it is run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
) -> None:
    """Convert a native checkpoint to this library, or back. The tokenizer is copied."""
    from hf_archs.commands import create

    _check_free(output, overwrite)
    _say(f"{create.convert(source, output, to, pickle)} in {output}")


@app.command(cls=_Command)
def describe(
    config: Annotated[str, typer.Argument(help="Folder, Hub repository, config.json, or ARCH or ARCH:SIZE.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    assign: Set = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
) -> None:
    """Show the mixer, feed-forward and cost of every layer. The totals are compared with attention in every layer."""
    from hf_archs import errors
    from hf_archs.commands import describe as costs
    from hf_archs.commands import tables
    from hf_archs.commands.loading import described_config

    if picture is not None:
        errors.needs("matplotlib", "--picture", "plot")
    described = described_config(config, _overrides(assign))
    layers = costs.layer_costs(described, length)
    attention = costs.attention_costs(described, length)
    tables.show(costs.table(f"{described.model_type}, {length:,} tokens", layers, attention), console)
    if picture is not None:
        costs.draw(layers, attention, length, picture)
        _say(f"drawn into {picture}")


@app.command(cls=_Command)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    data: Annotated[list[str] | None, typer.Option(help="Text, rows or dataset, as for train; repeatable.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval, or YAML files; repeatable.")] = None,
    adapter: Adapter = None,
    tokenizer: OtherTokenizer = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most examples of a task.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens in one forward; the figures do not depend on it.")] = 512,
    column: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows when they are needed.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what is wrong, and count it.")] = False,
) -> None:
    """Measure the loss of a model on data, or its scores in tasks.

    A long document is read whole: the state is carried between chunks.
    """
    from hf_archs.commands import evaluate as job
    from hf_archs.commands import tables

    found = job.evaluate(
        model,
        data or (),
        adapter,
        tokenizer,
        tasks=tasks or (),
        limit=limit,
        chunk=chunk,
        say=_say,
        column=column,
        streaming=streaming,
        skip_bad=skip_bad,
    )
    for table in found:
        tables.show(table, console)


@app.command(cls=_Command)
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a model with experts.")],
    data: Annotated[str, typer.Option(help="Text, rows or dataset, as for train.")],
    picture: Annotated[Path | None, typer.Option(help="PNG file to draw the heat map into.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the text to run.")] = 65536,
    tokenizer: OtherTokenizer = None,
) -> None:
    """Show how the routers of a model route a text. The figures are load, entropy, drops and score corrections."""
    from hf_archs import errors
    from hf_archs.commands import tables
    from hf_archs.commands.inspect import draw, read_figures, table

    if picture is not None:
        errors.needs("matplotlib", "--picture", "plot")
    figures = read_figures(model, data, tokens, tokenizer)
    tables.show(table(figures), console)
    if picture is not None:
        draw(figures, picture)
        _say(f"drawn into {picture}")


@app.command(cls=_Command)
def bench(
    kinds: Annotated[list[str] | None, typer.Argument(help="ops, models, or both (the default).")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Architecture; may be repeated. By default all.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for the machine and the results.")] = None,
) -> None:
    """Compare ops and whole models with their peers in one run. It reports medians of ratios, on a GPU if available."""
    import torch

    from hf_archs.commands import bench as benchmark

    unknown = set(kinds or ()) - {"ops", "models"}
    if unknown:
        raise ValueError(f"bench: {min(unknown)!r} is no kind of measure; allowed are ops and models")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    results = []
    for kind in kinds or ("ops", "models"):
        results += benchmark.run(benchmark.measures(kind, device, arch), device, lambda r: _say(str(r)))
    if output is not None:
        benchmark.write(results, device, output)


@app.command(cls=_ShownCommand)
def quickstart(
    arch: Annotated[str, typer.Option(help="Name of the architecture.")] = "mamba",
    task: Annotated[str, typer.Option(help="text, or genome: DNA, compared with Markov models.")] = "text",
    size: Annotated[str | None, typer.Option(help="A size, or tiny; by default the task's, or the first.")] = None,
    assign: Set = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the pretraining.")] = None,
    lora_steps: Annotated[int | None, typer.Option(help="Steps of the LoRA training.")] = None,
    data: Annotated[str | None, typer.Option(help="Text, or rows with a column text; FASTA file for DNA.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Measure on all held-out text, not on a sample.")] = False,
    output: Output = Path("quickstart"),
    hub: Annotated[bool, typer.Option("--hub", help="Push to huggingface.co, not to an embedded Hub.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make the pushed repositories public.")] = False,
    batch: Annotated[int | None, typer.Option(help="Rows in a batch.")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train, adapt, generate, push, pull and compare. On text with a LoRA adapter, or on DNA."""
    from hf_archs.commands import quickstart as job

    options = job.make_options(
        task,
        arch=arch,
        size=size,
        overrides=_overrides(assign),
        steps=steps,
        lora_steps=lora_steps,
        data=data,
        full=full or None,
        output=str(output),
        hub=hub,
        public=public,
        batch=batch,
        block=block,
        seed=seed,
    )
    job.quickstart(options, console)


def _silence_libraries() -> None:
    """Silence reports on loading and on retries, which this program sums up (HF_ARCHS_DEBUG keeps them)."""
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    hub_logging.set_verbosity(hub_logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading and saving; training and downloads have other bars


def _use_all_cores() -> None:
    """Start one thread per physical core; torch's own number is too low on virtual machines that it misreads."""
    import psutil
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):  # the process may be restricted to fewer
        cores = min(cores, len(os.sched_getaffinity(0)))
    torch.set_num_threads(max(cores, torch.get_num_threads()))


def main() -> None:
    """Run the command line. An expected error prints one sentence to stderr and exits with status 2."""
    try:
        app(prog_name="hf-archs")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from hf_archs.commands import sentences

        if not sentences.is_expected(error):
            raise
        sys.exit(sentences.report(error))


if __name__ == "__main__":
    main()
