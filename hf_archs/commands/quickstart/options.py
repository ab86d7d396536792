"""The options of each task."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from hf_archs.data import dna


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `quickstart` for every task.

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
        data: see `hf_archs.data.text.read_corpus`; the standard library's source, unless something else is named.
        lora_steps, lora_learning_rate: optimizer steps of LoRA, and their rate; the adapter goes to ``adapter/``.
        full: measure with all held-out text, not with `SAMPLE` characters of each (`hf_archs.data.text.sample`).
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


def label_of(data: str) -> str:
    """A word for the data."""
    known = {"stdlib": "code", "topics": "English"}
    return known.get(data) or (Path(data).expanduser().resolve().name if Path(data).expanduser().exists() else data)
