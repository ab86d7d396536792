"""``hf-archs evaluate``: the loss of a model on text and on rows, and its scores in the tasks of lm-eval."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from hf_archs.commands.loading import load_ready
from hf_archs.data import examples
from hf_archs.data.rows import Rows
from hf_archs.data.sources import read_rows
from hf_archs.errors import needs


def evaluate(
    model: str,
    data: Sequence[str],
    adapter: str | None = None,
    tokenizer: str | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    chunk: int = 512,
    say: Callable[[str], object] = print,
    **reading: Any,
) -> list[Table]:
    """The losses on the sources of ``data``, and the scores in ``tasks``: a table each, if there are any.

    Args:
        model, adapter, tokenizer: as for `load_ready`.
        data, reading: see `read_rows`; of rows, the tokens that training would learn are measured.
        tasks: tasks of lm-eval: names, YAML files, folders of such files.
        limit: the most examples of a task; None for all.
        chunk: tokens in one forward; the state is carried to the next, so that no figure depends on it.
        say: called with a line for each source of which something was left out.

    Raises:
        ImportError: if there are tasks, and lm-eval is not installed.
        OSError, ValueError: if the model or a source is wrong, a task is unknown, or there is nothing to evaluate.
    """
    if not data and not tasks:
        raise ValueError("neither data nor tasks are given; allowed are --data, --tasks, or both")
    # before the model, which takes longer
    found = _find_tasks(tasks) if tasks else None
    sources = [read_rows(name, whole=True, **reading) for name in data]
    loaded, encoder = load_ready(model, adapter, tokenizer)
    tables = [_losses(loaded, encoder, sources, chunk, say)] if sources else []
    return tables if found is None else [*tables, _scores(loaded, encoder, *found, limit)]


def _losses(model: Any, tokenizer: Any, sources: list[Rows], chunk: int, say: Callable[[str], object]) -> Table:
    """A row for each source, of which every document or row is read from its beginning to its end."""
    table = Table("data", "rows", "tokens", "bytes", "loss per token", "perplexity", "bits per byte")
    for rows in sources:
        sizes = examples.Found()
        found = examples.measure(model, tokenizer, rows, chunk=chunk, found=sizes)
        figures = (f"{found.loss:.4f}", f"{found.perplexity:.3f}", f"{found.bits_per_byte:.4f}")
        table.add_row(rows.source, *(f"{size:,}" for size in (sizes.rows, found.tokens, found.bytes)), *figures)
        if rows.left_out:
            say(f"{rows.source}: {examples.left_out(rows)}")
    return table


def _find_tasks(tasks: Sequence[str]) -> tuple[list[Any], Any]:
    """Tasks for `lm_eval.simple_evaluate`, and the manager that knows them."""
    needs("lm_eval", "--tasks", "tasks")
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig(tasks=[*tasks])
    try:
        manager = config.process_tasks()
    except ValueError as error:
        raise ValueError(f"{error}; allowed are the tasks of `lm-eval ls tasks`, and YAML files") from error
    return config.tasks, manager


def _scores(model: Any, tokenizer: Any, tasks: list[Any], manager: Any, limit: int | None) -> Table:
    """A row for each metric of each task, with its standard error."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
    found = lm_eval.simple_evaluate(harness, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    table = Table("task", "examples", "metric", "score", "standard error")
    for task, metrics in found["results"].items():
        examples_of = found["n-samples"].get(task, {}).get("effective", "")
        for name, score in metrics.items():
            metric, comma, kind = name.partition(",")
            if comma and not metric.endswith("stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}", "")
                shown = (f"{n:.4f}" if isinstance(n, float) else str(n) for n in (score, error))
                table.add_row(task, str(examples_of), metric if kind == "none" else f"{metric}, {kind}", *shown)
    return table
