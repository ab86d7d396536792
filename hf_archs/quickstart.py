"""The library's main job in one run: pretrain, adapt with LoRA, generate, push, pull, and check every step.

Everything goes through the host libraries as a user would call them: `transformers.Trainer`, `peft`, the Auto
classes and the client of huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

import hf_archs
from hf_archs import checkpoints, dna, publish, text, versions
from hf_archs.errors import CheckFailed, needs
from hf_archs.progress import Bar, working
from hf_archs.registry import get_architecture
from hf_archs.training import ArchTrainer, add_lora, checkpoint_folders, newest_whole

T = TypeVar("T")

MERGE_TOLERANCE = 1e-4  # of the largest logit: float32 rounds W x + B A x and (W + B A) x differently
CODE_PROMPT, ENGLISH_PROMPT = "def read_file(path):\n", "The function returns"
SAMPLE = 2**17  # characters of each held-out text that are measured
NEW_TOKENS = 60  # of a generated text
SAVE_EVERY = 30.0  # seconds between two checkpoints of a training


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `quickstart` is asked for, whatever the task.

    Attributes:
        arch: name of the architecture.
        size: one of its sizes; None takes the one with the task's name, or the first.
        overrides: config fields that differ from the size.
        output: folder for ``model/``, ``loss.png`` and ``summary.json``; until they are there, finished stages lie in
            its ``unfinished/``, from where the same options go on after an interruption.
        hub: push to huggingface.co (``HF_ENDPOINT``) instead of to an embedded Hub.
        public: whether the repositories can be seen by everybody.
        data: what to pretrain on.
        steps: optimizer steps of the pretraining.
        batch, block: rows of a step, and tokens of a row.
        seed: of the initial weights and the order of the data.
        learning_rate: of the pretraining.
    """

    task: ClassVar[str]
    arch: str = "mamba"
    size: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    output: str = "quickstart"
    hub: bool = False
    public: bool = False
    data: str
    steps: int
    batch: int
    block: int
    seed: int = 0
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            self._check(name, 1)
        self._check("block", 2)

    def _check(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name} is {getattr(self, name)}; allowed are {least} or more")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Pretrain on text, adapt with LoRA to English.

    Attributes:
        data: see `hf_archs.text.read_corpus`; the standard library's source, unless something else is named.
        lora_steps, lora_learning_rate: optimizer steps of LoRA, and their rate; the adapter goes to ``adapter/``.
        full: measure with all held-out text, not with `SAMPLE` characters of each (`hf_archs.text.sample`).
    """

    task = "text"
    data: str = "stdlib"
    steps: int = 130
    batch: int = 8
    block: int = 512
    lora_steps: int = 70
    lora_learning_rate: float = 4e-3
    full: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("lora_steps", 1)


@dataclass(frozen=True, kw_only=True)
class GenomeOptions(Options):
    """Pretrain on DNA, compare with Markov models.

    Attributes:
        data: a FASTA file.
    """

    task = "genome"
    data: str = str(dna.GENOME)
    steps: int = 600
    batch: int = 2
    block: int = 4096


TASKS: dict[str, type[Options]] = {options.task: options for options in (TextOptions, GenomeOptions)}


def make_options(task: str, **given: Any) -> Options:
    """The options of a task; None stands for what nobody gave.

    Raises:
        ValueError: for an unknown task, an option that it does not have, or a value out of range.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed are {' and '.join(TASKS)}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - {f.name for f in fields(TASKS[task])}:
        raise ValueError(f"{name} is {given[name]!r}, but the task {task!r} has no {name}")
    return TASKS[task](**given)


class _Run:
    """The finished stages of a run, kept in ``unfinished/`` of its output folder until it ends, so that it can go on.

    ``state.json`` there holds the options and the figures of every stage that is done; beside it lie the models, the
    tokenizer and checkpoints. `_going_on` opens it.
    """

    def __init__(self, options: Options, data: bytes, console: Console):
        self.options, self.console = options, console
        self.output = Path(options.output).expanduser()
        self.folder = self.output / "unfinished"
        self.began = time.perf_counter()
        elsewhere = ("output", "hub", "public")  # none of them changes a model
        given = {name: value for name, value in asdict(options).items() if name not in elsewhere}
        given |= {"task": options.task, "data": f"{options.data}, sha256 {hashlib.sha256(data).hexdigest()}"}
        self.state: dict[str, Any] = {"made_by": json.loads(json.dumps(given)), "seconds": 0.0, "done": {}}
        if self.folder.exists():
            self._go_on()
        self._write()

    def _go_on(self) -> None:
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"{str(self.folder)!r} is no unfinished quickstart ({error}); move it away"
            ) from error
        ours, theirs = self.state["made_by"], found["made_by"]
        if ours == theirs:
            self.state = found
            if found["done"]:
                self._say(f"going on from {self.folder}: {self._done()}")
            return
        differ = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        told = (f"{name} was {theirs.get(name)}, and is {ours.get(name)} now" for name in sorted(differ))
        self._say(f"{self.folder} was made with other options ({'; '.join(told)}): starting anew")
        shutil.rmtree(self.folder)

    def _write(self) -> None:
        now = time.perf_counter()
        self.state["seconds"] += now - self.began
        self.began = now
        with checkpoints.replacing(self.folder) as folder:
            (folder / "state.json").write_text(json.dumps(self.state), encoding="utf-8")

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def _done(self) -> str:
        stages = {place: _newest(place) for place in self.folder.glob("*") if place.is_dir()}
        steps = [f"{stage.name} up to step {step}" for stage, (_, step) in stages.items() if step]
        return ", ".join([*self.state["done"], *steps])

    @property
    def seconds(self) -> float:
        """Of all its parts."""
        return self.state["seconds"] + time.perf_counter() - self.began

    def once(self, stage: str, compute: Callable[[], T]) -> T:
        """The figures of a stage, as JSON keeps them: computed, unless an interrupted run came so far."""
        done = self.state["done"]
        if stage not in done:
            done[stage] = compute()
            self._write()
        return done[stage]

    def train(
        self, stage: str, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, steps: int, rate: float
    ) -> dict[str, Any]:
        """Train on rows of ``input_ids`` and ``labels``, from the last checkpoint of ``stage`` on where there is one.

        Returns:
            ``losses``, in nats per token at every step, and ``tokens_per_second``.
        """
        scratch = self.folder / stage
        arguments = TrainingArguments(
            output_dir=str(scratch),
            max_steps=steps,
            per_device_train_batch_size=self.options.batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(steps / 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=1,
            logging_strategy="steps",
            save_strategy="no",  # `_Steps` says when
            save_total_limit=1,
            disable_tqdm=True,
            report_to="none",
            seed=self.options.seed,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        trainer = ArchTrainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        newest, before = _newest(scratch)
        began = time.perf_counter()
        with working(stage) as bar:
            trainer.add_callback(_Steps(bar))
            trainer.train(resume_from_checkpoint=newest)
        tokens = (steps - before) * self.options.batch * self.options.block
        speed = tokens / (time.perf_counter() - began)
        shutil.rmtree(scratch, ignore_errors=True)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {"losses": losses, "tokens_per_second": speed}

    def finish(self, summary: dict[str, Any], table: Callable[[Mapping[str, Any]], Table]) -> dict[str, Any]:
        """Move what was made into the output folder, and write and print the summary.

        Raises:
            CheckFailed: where one of its checks failed.
        """
        summary["seconds"] = self.seconds
        with checkpoints.replacing(self.output) as folder:
            for name in ("model", "adapter", "loss.png"):
                if (self.folder / name).exists():
                    shutil.move(self.folder / name, folder / name)
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(self.folder)
        self.console.print(table(summary))
        self._say(f"written to {self.output}")
        for check in ("merged_equals_unmerged", "pulled_equals_pushed"):
            if not summary.get(check, True):
                raise CheckFailed(f"{check} is false, see {self.output / 'summary.json'}")
        return summary


def _newest(stage: Path) -> tuple[str | None, int]:
    """The newest whole checkpoint of a stage, and the steps behind it; None and 0 where there is none."""
    steps = checkpoint_folders(stage)
    newest, _ = newest_whole(steps)
    return (None, 0) if newest is None else (str(newest), steps[newest])


@contextmanager
def _going_on(options: Options, data: bytes, console: Console) -> Iterator[_Run]:
    """A run; where it is interrupted, it says what is kept."""
    run = _Run(options, data, console)
    try:
        yield run
    except BaseException:
        if run.folder.exists():  # else it came to its end, and a check failed
            with suppress(OSError):
                run._write()
            kept = run._done() or "nothing yet"
            run._say(f"stopped; kept in {run.folder}: {kept}. The same command goes on from there.")
        raise


class _Steps(TrainerCallback):
    """The bar of a training, and checkpoints now and then."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.perf_counter()
        self.bar(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # after the last step the model itself is saved
        if time.perf_counter() - self.saved > SAVE_EVERY and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")


class _Tokens(BaseStreamer):
    """The bar of a generation."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.count = bar, -1  # the prompt comes first

    def put(self, value: Any) -> None:
        self.count += 1
        self.bar(self.count, NEW_TOKENS)

    def end(self) -> None:
        pass


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    set_seed(seed)
    start = [text.start_token(tokenizer), *text.encode(tokenizer, prompt)]
    with working("generating") as bar:
        output = model.generate(
            torch.tensor([start], device=model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Tokens(bar),
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def quickstart(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Run the job of these options, `_text` or `_genome`, and give its summary, which is also in ``summary.json``.

    Raises:
        ValueError, OSError: for a wrong option, before anything is trained, and where the Hub refuses.
        CheckFailed: where a model pulled from the Hub differs from what was pushed, or a merged model from its parts.
    """
    jobs: dict[type[Options], Callable[[Any, Console], dict[str, Any]]] = {TextOptions: _text, GenomeOptions: _genome}
    return jobs[type(options)](options, console or Console())


def _prepare(options: Options, overrides: Mapping[str, Any]) -> tuple[Any, int, str]:
    """The config, its number of parameters and the repository's name; and what is missing is better known now."""
    architecture = get_architecture(options.arch)
    size = options.task if options.size is None and options.task in architecture.sizes else options.size
    config = checkpoints.sized_config(architecture, size, {**overrides, **options.overrides})
    parameters = checkpoints.check_memory(config, copies=4)
    # the model, and for a moment two checkpoints with AdamW's two moments
    checkpoints.check_output(options.output, parameters * 4 * (1 + 2 * 3))
    repository = f"hf-archs-quickstart-{options.arch}"
    with working("looking for matplotlib and a Hub"):
        needs("matplotlib", "the picture of the losses", "quickstart")
        if options.hub:
            publish.repositories(repository)
        else:
            _embedded_hub()
    return config, parameters, repository


def _embedded_hub() -> Any:
    return needs("hf_archs.testing.hub", "the embedded Hub", "quickstart").EmbeddedHub


def _to_device(model: Any) -> Any:
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def _new_model(config: Any, seed: int) -> Any:
    set_seed(seed)
    return _to_device(AutoModelForCausalLM.from_config(config))


def _save(folder: Path, *parts: Any) -> None:
    with checkpoints.replacing(folder) as partial:
        for part in parts:
            part.save_pretrained(partial)


def _text(options: TextOptions, console: Console) -> dict[str, Any]:
    """Run the main job and give its summary, which is also in ``summary.json``.

    1. A tokenizer and a small model are trained on the corpus; held-out documents are never trained on.
    2. A LoRA adapter is trained on English, the topics of Python's ``help()``.
    3. Text is generated from both.
    4. Model, tokenizer, adapter and cards are pushed to a Hub.
    5. They are pulled into an empty cache, and their logits compared with those of what was pushed.
    6. A table is printed; ``loss.png``, ``model/`` (before LoRA), ``adapter/`` and ``summary.json`` are written.
    """
    config, parameters, repository = _prepare(options, {})
    with working(f"reading {options.data}"):
        code, held_out_code = text.split(text.read_corpus(options.data))
        english, held_out_english = text.split(text.read_corpus("topics"))
        data = json.dumps([code, held_out_code]).encode()
    held_out = {"code": held_out_code, "english": held_out_english}
    measured = held_out if options.full else {name: text.sample(texts, SAMPLE) for name, texts in held_out.items()}
    characters = {name: {"measured": _size(measured[name]), "held_out": _size(held_out[name])} for name in held_out}

    with _going_on(options, data, console) as run:
        labels = {"code": _label(options.data), "english": "English"}

        def load() -> Any:
            return _to_device(AutoModelForCausalLM.from_pretrained(run.folder / "model"))

        def measure(name: str, model: Any, what: str) -> float:
            with working(f"measuring {what} on held-out {labels[name]}") as bar:
                return text.bits_per_byte(model, tokenizer, measured[name].values(), progress=bar)

        def train(stage: str, model: Any, texts: Mapping[str, str], steps: int, rate: float) -> dict[str, Any]:
            with working(f"encoding the text for {stage}") as bar:
                # no more than a multiple of what the steps will see
                enough = text.sample(texts, 16 * steps * options.batch * options.block, longest=_size(texts))
                rows = text.token_blocks(tokenizer, enough.values(), options.block, bar)
            trained = run.train(stage, model, tokenizer, rows, steps, rate)
            return {**trained, "bytes_per_token": _bytes_per_token(tokenizer, rows)}

        console.print(f"[bold]1[/] tokenizer and {options.arch} of {parameters:,} parameters on {escape(options.data)}")

        def train_tokenizer() -> None:
            with working("training the tokenizer"):
                _save(run.folder / "tokenizer", text.train_tokenizer(code.values(), config.vocab_size))

        run.once("tokenizer", train_tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
        untrained = run.once(
            "figures before", lambda: measure("code", _new_model(config, options.seed), "the untrained model")
        )

        def pretrain() -> dict[str, Any]:
            model = _new_model(config, options.seed)
            trained = train("pretraining", model, code, options.steps, options.learning_rate)
            _save(run.folder / "model", model, tokenizer)
            return trained

        pretrained = run.once("model", pretrain)
        model = load()
        after = run.once("figures after", lambda: {name: measure(name, model, "the model") for name in labels})
        samples = {"model": run.once("text", lambda: _generate(model, tokenizer, _prompts(options)[0], options.seed))}
        prompt = next(iter(held_out_english.values()))[:500]
        tokens = torch.tensor([text.encode(tokenizer, prompt)])
        pushed = {"model": publish.logits(model, tokens)}

        console.print("[bold]2[/] LoRA on English")

        def adapt() -> dict[str, Any]:
            set_seed(options.seed)
            adapted = add_lora(load(), rank=32, alpha=128)
            trained = train("LoRA", adapted, english, options.lora_steps, options.lora_learning_rate)
            _save(run.folder / "adapter", adapted)
            about = run.folder / "adapter" / "adapter_config.json"
            base = {"base_model_name_or_path": str((run.output / "model").resolve())}  # where it will be
            about.write_text(json.dumps(json.loads(about.read_text()) | base, indent=2), encoding="utf-8")
            return trained

        adapter = run.once("adapter", adapt)
        model = checkpoints.load_adapter(model, str((run.folder / "adapter").resolve()))
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
            "text with LoRA", lambda: _generate(model, tokenizer, ENGLISH_PROMPT, options.seed)
        )
        for sample in samples.values():
            console.print(sample, style="dim", markup=False, highlight=False)
        merged = publish.logits(model.merge_and_unload(safe_merge=False), tokens)
        difference = (merged - pushed["adapter"]).abs().max().item()
        agrees = difference <= MERGE_TOLERANCE * pushed["adapter"].abs().max().item()

        summary = {
            "arch": options.arch,
            "parameters": parameters,
            "seconds": 0.0,
            "tokens_per_second": pretrained["tokens_per_second"],
            "data": options.data,
            "bits_per_byte": bits,
            "characters": characters,
            "merged_equals_unmerged": agrees,
            "merged_largest_difference": difference,
            **_share(run, repository, prompt, tokens, pushed, _cards(options, bits, characters)),
            "steps": {"code": options.steps, "lora": options.lora_steps},
            "losses": {"code": pretrained["losses"], "lora": adapter["losses"]},
            "bytes_per_token": {"code": pretrained["bytes_per_token"], "lora": adapter["bytes_per_token"]},
            "samples": samples,
            **_ran(),
        }
        curves = {f"pretraining on {labels['code']}": pretrained, "LoRA on English": adapter}
        _draw({what: _bits(t["losses"], t["bytes_per_token"]) for what, t in curves.items()}, "byte", run.folder)
        return run.finish(summary, _table)


def _genome(options: GenomeOptions, console: Console) -> dict[str, Any]:
    """Train on DNA, and compare with Markov models fitted on the same bases.

    The first nine tenths of the bases are trained on, on both strands; all of the rest is scored, every window from an
    empty context. The model is pushed to a Hub, pulled into an empty cache, and its logits compared.
    """
    tokenizer = dna.dna_tokenizer(add_bos=True)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config, parameters, repository = _prepare(options, {"vocab_size": len(tokenizer), **special})
    with working(f"reading {options.data}"):
        bases, held_out = dna.split(dna.read_fasta(options.data))
        rows = dna.Windows(bases, options.block, options.steps * options.batch, options.seed)

    with _going_on(options, np.concatenate([bases, held_out]).tobytes(), console) as run:
        console.print(f"[bold]1[/] Markov models on {len(bases):,} bases")

        def fit(order: int) -> float:
            with working(f"counting for the Markov model of order {order}"):
                return dna.markov_bits(bases, held_out, order)

        markov = run.once("Markov models", lambda: {str(order): fit(order) for order in range(1, 13)})
        console.print(f"[bold]2[/] {options.arch} of {parameters:,} parameters on both strands of them")

        def pretrain() -> dict[str, Any]:
            model = _new_model(config, options.seed)
            trained = run.train("pretraining", model, tokenizer, rows, options.steps, options.learning_rate)
            _save(run.folder / "model", model, tokenizer)
            return trained

        pretrained = run.once("model", pretrain)
        model = _to_device(AutoModelForCausalLM.from_pretrained(run.folder / "model"))

        def measure() -> float:
            with working("measuring the model on held-out bases") as bar:
                return dna.bits_per_base(model, held_out, options.block, progress=bar)

        bits = {"model": run.once("figures after", measure), "best_markov": min(markov.values()), "markov": markov}
        prompt = "".join(dna.BASES[base] for base in held_out[:500])
        tokens = torch.tensor([text.encode(tokenizer, prompt)])
        pushed = {"model": publish.logits(model, tokens)}

        console.print("[bold]3[/] generated bases")
        sample = run.once("bases", lambda: _generate(model, tokenizer, prompt[:60], options.seed))
        console.print(sample, style="dim", markup=False, highlight=False)
        card = {
            "training": f"{options.steps:,} steps of {options.batch} x {options.block} bases, from both strands of "
            f"`{Path(options.data).name}`, by {_command(options)}. A demonstration: too small to be of use.",
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
            **_share(run, repository, prompt, tokens, pushed, {"model": card}),
            "steps": options.steps,
            "losses": pretrained["losses"],
            "samples": {"model": sample},
            **_ran(),
        }
        _draw({"pretraining": _bits(pretrained["losses"], 1)}, "base", run.folder)
        return run.finish(summary, _genome_table)


def _size(texts: Mapping[str, str]) -> int:
    return sum(map(len, texts.values()))


def _bytes_per_token(tokenizer: PreTrainedTokenizerBase, rows: Any) -> float:
    """The mean over some of the rows, from all over them."""
    some = [rows[i]["input_ids"] for i in range(0, len(rows), math.ceil(len(rows) / 256))]
    size = sum(len(str(tokenizer.decode(row, skip_special_tokens=True)).encode()) for row in some)
    return size / sum(map(len, some))


def _bits(losses: list[float], size: float) -> list[float]:
    """Nats per token as bits for each unit of the data, of which a token has ``size``."""
    return [loss / math.log(2) / size for loss in losses]


def _ran() -> dict[str, Any]:
    """Where it ran, and with what."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    installed = {library.name: library.found for library in versions.compare() if library.found}
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": {"python": platform.python_version(), "hf-archs": hf_archs.__version__, **installed},
    }


def _command(options: Options) -> str:
    """The command that does this, and where it ran."""
    told = ("output", "hub", "public", "overrides", "learning_rate", "lora_learning_rate")  # elsewhere, or no flags
    names = [f.name for f in fields(options) if f.name not in told and getattr(options, f.name) != f.default]
    words = [] if isinstance(options, TextOptions) else [f"--task {options.task}"]
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    words += [
        flag if getattr(options, name) is True else f"{flag} {getattr(options, name)}" for name, flag in flags.items()
    ]
    words += [f"--set {name}={value}" for name, value in options.overrides.items()]
    command = " ".join(["hf-archs quickstart", *words])
    return f"`{command}` on {platform.machine()} with {torch.get_num_threads()} threads"


def _label(data: str) -> str:
    """A word for the data."""
    known = {"stdlib": "code", "topics": "English"}
    return known.get(data) or (Path(data).expanduser().resolve().name if Path(data).expanduser().exists() else data)


def _prompts(options: TextOptions) -> tuple[str, str]:
    """The beginnings of the text that is generated here, and of that in the card; empty for data that is not ours."""
    return (CODE_PROMPT, "import ") if options.data == "stdlib" else ("", "")


def _cards(
    options: TextOptions, bits: Mapping[str, Mapping[str, float]], characters: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Any]]:
    ours = options.data == "stdlib"  # of other data nobody said under which licence its model may go on
    corpus = "the source of Python's standard library" if ours else f"`{options.data}`"
    license = "apache-2.0" if ours else None
    code, english = bits["code"], bits["english"]
    label = {
        name: f"held-out {what} ({sizes['measured']:,} of {sizes['held_out']:,} characters)"
        for (name, sizes), what in zip(characters.items(), (_label(options.data), "English"))
    }
    return {
        "model": {
            "training": f"{options.steps:,} steps of {options.batch} x {options.block} tokens on {corpus}, by "
            f"{_command(options)}. A demonstration: too small to be of use.",
            "results": {
                f"{label['code']}, before training": f"{code['before']:.3f} bits per byte",
                f"{label['code']}, after": f"{code['after']:.3f} bits per byte",
            },
            "license": license,
            "prompt": _prompts(options)[1],
        },
        "adapter": {
            "training": f"{options.lora_steps:,} steps of {options.batch} x {options.block} tokens on the topics of "
            f"Python's `help()`, by {_command(options)}.",
            "results": {
                f"{label['english']}, without the adapter": f"{english['before_lora']:.3f} bits per byte",
                f"{label['english']}, with it": f"{english['after_lora']:.3f} bits per byte",
                f"{label['code']}, without it": f"{code['after']:.3f} bits per byte",
                f"{label['code']}, with it": f"{code['after_lora']:.3f} bits per byte",
            },
            "license": license,
        },
    }


def _share(
    run: _Run,
    repository: str,
    prompt: str,
    tokens: torch.Tensor,
    pushed: Mapping[str, torch.Tensor],
    cards: Mapping[str, Any],
) -> dict[str, Any]:
    """Push, pull into an empty cache, compare."""
    hub = "the Hub" if run.options.hub else "an embedded Hub"
    run.console.print(f"[bold]4[/] push to {hub}, [bold]5[/] and pull")
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: f"{scratch}/{name}.safetensors" for name in ("tokens", "logits")}
        save_file({"tokens": tokens}, files["tokens"])
        push = {"folder": str(run.folder), "name": repository, "private": not run.options.public, "cards": cards}
        pull = {"text": prompt, "tokens": files["tokens"], "output": files["logits"], "cache": f"{scratch}/pulled"}
        if run.options.hub:
            answer = publish.run({"HF_XET_CACHE": f"{scratch}/xet"}, push, pull)
        else:
            with _embedded_hub()() as server:
                answer = publish.run(server.environment(f"{scratch}/home"), push, pull)
        pulled = load_file(files["logits"])
    same = {part: torch.equal(pulled[part], pushed[part]) for part in pushed} | answer["same"]
    return {"repositories": answer["names"], "pulled_equals_pushed": all(same.values()), "pulled": same}


def _draw(curves: Mapping[str, list[float]], unit: str, folder: Path) -> None:
    """``loss.png``: the training loss of every step, in bits for each ``unit`` of the data."""
    with working("drawing the losses"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        begin = 1
        for label, bits in curves.items():
            axes.plot(range(begin, begin + len(bits)), bits, label=label)
            begin += len(bits)
        last = max(begin - 1, 2)
        inner = ticker.MaxNLocator(8, integer=True).tick_values(1, last)
        axes.set_xticks(sorted({1, *(int(tick) for tick in inner if 1 < tick <= last)}))
        axes.set_xlim(1, last)
        axes.set_ylim(bottom=math.floor(min(min(bits) for bits in curves.values())))
        axes.set(xlabel="step", ylabel=f"training loss (bits per {unit})", title="hf-archs quickstart")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / "loss.png", dpi=120)
        pyplot.close(figure)


_YES = {True: "[green]yes", False: "[red]no"}


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"{summary['arch']}, {summary['parameters']:,} parameters: bits per byte of held-out text")
    table.caption = "; ".join(
        f"{'English' if name == 'english' else _label(summary['data'])}: {sizes['measured']:,} of "
        f"{sizes['held_out']:,} held-out characters"
        for name, sizes in summary["characters"].items()
    )
    for heading in ("text", "untrained", "trained", "with LoRA"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    code, english = summary["bits_per_byte"]["code"], summary["bits_per_byte"]["english"]
    table.add_row(
        escape(_label(summary["data"])), f"{code['before']:.3f}", f"{code['after']:.3f}", f"{code['after_lora']:.3f}"
    )
    change = english["after_lora"] / english["before_lora"] - 1
    table.add_row("English", "", f"{english['before_lora']:.3f}", f"{english['after_lora']:.3f} ({change:+.0%})")
    table.add_section()
    table.add_row("merged = unmerged", "", "", _YES[summary["merged_equals_unmerged"]])
    table.add_row("pulled = pushed", "", "", _YES[summary["pulled_equals_pushed"]])
    table.add_row("tokens per second", "", "", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds in all", "", "", f"{summary['seconds']:,.0f}")
    return table


def _genome_table(summary: Mapping[str, Any]) -> Table:
    bits = summary["bits_per_base"]
    table = Table(title=f"{summary['arch']}, {summary['parameters']:,} parameters: bits per base of held-out DNA")
    table.add_column("model")
    table.add_column("bits per base", justify="right")
    for order, value in bits["markov"].items():
        best = " (the best of them)" if value == bits["best_markov"] else ""
        table.add_row(f"Markov, order {order}{best}", f"{value:.3f}")
    table.add_row(f"[bold]{summary['arch']}", f"[bold]{bits['model']:.3f}")
    table.add_section()
    table.add_row("pulled = pushed", _YES[summary["pulled_equals_pushed"]])
    table.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds in all", f"{summary['seconds']:,.0f}")
    return table
