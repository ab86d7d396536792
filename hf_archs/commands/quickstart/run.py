"""The finished stages of a run, from which an interrupted run continues."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from hf_archs.commands.quickstart.options import Options
from hf_archs.commands.quickstart.training import newest_of
from hf_archs.commands.sentences import CheckFailed
from hf_archs.native import disk

T = TypeVar("T")


class Run:
    """A quickstart run, whose finished stages are kept in ``unfinished/`` of the output folder until it succeeds.

    ``state.json`` in that folder holds the options and the figures of every finished stage; beside it are the models,
    the tokenizer and checkpoints. `going_on` opens a run.
    """

    def __init__(self, options: Options, data: bytes, console: Console) -> None:
        self.options, self.console = options, console
        self.output = Path(options.output).expanduser()
        self.folder = self.output / "unfinished"
        self.began = time.perf_counter()
        others = ("output", "hub", "public")  # fields that change no model
        given = {name: value for name, value in asdict(options).items() if name not in others}
        given |= {"task": options.task, "data": f"{options.data}, sha256 {hashlib.sha256(data).hexdigest()}"}
        self.state: dict[str, Any] = {"made_by": json.loads(json.dumps(given)), "seconds": 0.0, "done": {}}
        if self.folder.exists():
            self._go_on()
        self.write()

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
                self.say(f"going on from {self.folder}: {self.kept()}")
            return
        changed = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        changes = (f"{name} was {theirs.get(name)}, and is {ours.get(name)} now" for name in sorted(changed))
        self.say(f"{self.folder} was made with other options ({'; '.join(changes)}): starting anew")
        shutil.rmtree(self.folder)

    def write(self) -> None:
        """Save the figures and the time so far."""
        now = time.perf_counter()
        self.state["seconds"] += now - self.began
        self.began = now
        with disk.replacing(self.folder) as folder:
            (folder / "state.json").write_text(json.dumps(self.state), encoding="utf-8")

    def say(self, sentence: str) -> None:
        """Print a line without wrapping and without reading brackets as markup."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def kept(self) -> str:
        """The finished stages, and the steps of an interrupted training, in words."""
        stages = {place: newest_of(place) for place in self.folder.glob("*") if place.is_dir()}
        steps = [f"{stage.name} up to step {step}" for stage, (_, step) in stages.items() if step]
        return ", ".join([*self.state["done"], *steps])

    @property
    def seconds(self) -> float:
        """The time of the run, earlier attempts included."""
        return self.state["seconds"] + time.perf_counter() - self.began

    def once(self, stage: str, compute: Callable[[], T]) -> T:
        """The figures of a stage: the saved ones if an earlier attempt finished the stage, else those of ``compute``.

        Figures consist of dicts, lists, strings and numbers, which JSON returns unchanged.
        """
        done = self.state["done"]
        if stage not in done:
            done[stage] = compute()
            self.write()
        return done[stage]

    def finish(self, summary: dict[str, Any], table: Callable[[Mapping[str, Any]], Table]) -> dict[str, Any]:
        """Move the models and the picture into the output folder, and write and print the summary.

        Raises:
            CheckFailed: if a check in the summary failed.
        """
        summary["seconds"] = self.seconds
        with disk.replacing(self.output) as folder:
            for name in ("model", "adapter", "loss.png"):
                if (self.folder / name).exists():
                    shutil.move(self.folder / name, folder / name)
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(self.folder)
        self.console.print(table(summary))
        self.say(f"written to {self.output}")
        for check in ("merged_equals_unmerged", "pulled_equals_pushed"):
            if not summary.get(check, True):
                raise CheckFailed(f"{check} is false, see {self.output / 'summary.json'}")
        return summary


@contextmanager
def going_on(options: Options, data: bytes, console: Console) -> Iterator[Run]:
    """Context manager: a run, which prints its finished stages if it is interrupted."""
    run = Run(options, data, console)
    try:
        yield run
    except BaseException:
        if run.folder.exists():  # `finish` has removed the folder if one of its checks failed
            with suppress(OSError):
                run.write()
            kept = run.kept() or "nothing yet"
            run.say(f"stopped; kept in {run.folder}: {kept}. The same command goes on from there.")
        raise
