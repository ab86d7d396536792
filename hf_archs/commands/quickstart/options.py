"""The quickstart options of each task."""

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
        size: a size of the architecture; None takes the size with the task's name, or the first size if there is none.
        overrides: config fields that differ from the size.
        output: folder for ``model/``, ``loss.png`` and ``summary.json``. Until the run ends, finished stages are in
            ``unfinished/`` there; after an interruption, a run with the same options continues from them.
        hub: push to huggingface.co (or ``HF_ENDPOINT``) instead of an embedded Hub.
        public: make the repositories public.
        data: source of the pretraining data.
        steps: optimizer steps of the pretraining.
        batch, block: rows in a batch, and tokens in a row.
        seed: seed of the initial weights and the order of the data.
        learning_rate: learning rate of the pretraining.
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
    """Pretrain on text, and adapt to English with LoRA.

    Attributes:
        data: see `hf_archs.data.sources.read_corpus`; by default the standard library's source.
        lora_steps, lora_learning_rate: optimizer steps and learning rate of LoRA; the adapter is saved in ``adapter/``.
        full: measure all held-out text, instead of `SAMPLE` characters of each set (`hf_archs.data.text.sample`).
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
    """Pretrain on DNA, and compare with Markov models.

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
    """The options of a task; None stands for an option that was not given.

    Raises:
        ValueError: for an unknown task, an option that the task does not have, or a value out of range.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed are {' and '.join(TASKS)}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - {f.name for f in fields(TASKS[task])}:
        raise ValueError(f"{name} is {given[name]!r}, but the task {task!r} has no {name}")
    return TASKS[task](**given)


def label_of(data: str) -> str:
    """A short name of the data."""
    known = {"stdlib": "code", "topics": "English"}
    return known.get(data) or (Path(data).expanduser().resolve().name if Path(data).expanduser().exists() else data)
