"""Compare the speed of ops and whole models with that of their peers: interleaved pairs, medians, ratios.

Machines are noisy, so every measure alternates between ours and the peer, and its ratio is the median of the pairs'
ratios. A slow machine makes nothing fail; the numbers go into a JSON file.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_archs import registry

Run = Callable[[], Any]


@dataclass
class Measure:
    """One comparison of ours with a peer, on the same input."""

    name: str
    peer: str
    ours: Run
    theirs: Run
    target: float | None = None  # largest allowed ratio ours / peer, on a CPU with two cores
    pairs: int = 7
    bytes_moved: int | None = None  # the fewest that the op can read and write, for its share of the bandwidth


@dataclass
class Result:
    """The result of one comparison: median of the pairs' ratios ours / peer, and median times in milliseconds."""

    name: str
    peer: str
    ratio: float
    ours_ms: float
    peer_ms: float
    pairs: int
    target: float | None
    bandwidth_share: float | None = None

    def __str__(self) -> str:
        target = "" if self.target is None else f", asked {self.target:g}"
        share = "" if self.bandwidth_share is None else f", {self.bandwidth_share:.0%} of the copy bandwidth"
        return (
            f"{self.name}: {self.ratio:.3f} of {self.peer}{target} "
            f"({self.ours_ms:.2f} and {self.peer_ms:.2f} ms, {self.pairs} pairs{share})"
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Run, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def compare(measure: Measure, device: torch.device, bandwidth: float | None = None) -> Result:
    """Run a measure: a warm-up of each side, then pairs. ``bandwidth`` is the device's, in bytes per second."""
    measure.ours()
    measure.theirs()
    pairs = [(_seconds(measure.ours, device), _seconds(measure.theirs, device)) for _ in range(measure.pairs)]
    ours = statistics.median(a for a, _ in pairs)
    share = measure.bytes_moved / ours / bandwidth if measure.bytes_moved and bandwidth else None
    return Result(
        name=measure.name,
        peer=measure.peer,
        ratio=statistics.median(a / b for a, b in pairs),
        ours_ms=1e3 * ours,
        peer_ms=1e3 * statistics.median(b for _, b in pairs),
        pairs=measure.pairs,
        target=measure.target,
        bandwidth_share=share,
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / statistics.median(_seconds(lambda: y.copy_(x), device) for _ in range(7))


# -- whole models ------------------------------------------------------------------------------------------------

SIZE: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4}


def _ids(length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(3, SIZE["vocab_size"], (1, length), device=device)


def _step(model: Any, length: int, device: torch.device) -> Run:
    ids = _ids(length, device)

    def run() -> None:
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def _prefill(model: Any, length: int, device: torch.device) -> Run:
    ids = _ids(length, device)

    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(ids, use_cache=True)

    return run


def _generate(model: Any, context: int, device: torch.device, new: int = 64) -> Run:
    ids = _ids(context, device)
    # an end token that cannot occur; min_new_tokens instead would add a tenth of a millisecond per token on both sides
    options = {"max_new_tokens": new, "eos_token_id": SIZE["vocab_size"], "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        model.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)

    return run


@dataclass(frozen=True)
class Targets:
    """The largest allowed ratios of an architecture on a CPU with two cores; None for no limit."""

    step: float | None = None  # training step at 1,024 tokens / Llama's
    long_step: float | None = None  # training step at 8,192 / Llama's
    growth: float | None = None  # training step at 4,096 / at 1,024
    long_growth: float | None = None  # training step at 16,384 / at 4,096
    native_step: float | None = None  # training step at 1,024 / the native class's
    prefill: float | None = None  # prefill of 2,048 tokens / the native class's
    decode: float | None = None  # 64 tokens through `generate` / the native class's


def model_measures(
    name: str,
    device: torch.device,
    fields: dict[str, Any],
    targets: Targets,
    native: Any = None,
    native_pairs: int = 7,
) -> Iterator[Measure]:
    """Training step, scaling, prefill and decoding of one architecture.

    Args:
        fields: config fields in addition to `SIZE`.
        native: transformers' own model of the same size, or None.
        native_pairs: pairs of training steps with ``native``; pass fewer if its step takes minutes.
    """
    config = registry.get_architecture(name).config_class(**SIZE, **fields)
    ours = AutoModelForCausalLM.from_config(config).to(device)
    attention: dict[str, Any] = {"intermediate_size": 688, "num_attention_heads": 4, "max_position_embeddings": 2**15}
    llama: Any = LlamaForCausalLM(LlamaConfig(**SIZE, **attention))
    llama.to(device)

    def step(length: int) -> Run:
        return _step(ours, length, device)

    at_1024, at_8192 = f"{name}: training step at 1,024", f"{name}: training step at 8,192"
    yield Measure(at_1024, "Llama", step(1024), _step(llama, 1024, device), targets.step)
    yield Measure(at_8192, "Llama", step(8192), _step(llama, 8192, device), targets.long_step)
    yield Measure(f"{name}: training step at 4,096", "at 1,024", step(4096), step(1024), targets.growth)
    yield Measure(f"{name}: training step at 16,384", "at 4,096", step(16384), step(4096), targets.long_growth, 3)
    if native is not None:
        yield from native_measures(name, device, ours, native, targets, native_pairs)


def native_measures(
    name: str, device: torch.device, ours: Any, native: Any, targets: Targets, native_pairs: int = 7
) -> Iterator[Measure]:
    """Training step, prefill and decoding of a model, compared with transformers' own model of the same size."""
    native.to(device)
    step, its_step = _step(ours, 1024, device), _step(native, 1024, device)
    yield Measure(f"{name}: training step at 1,024", "transformers", step, its_step, targets.native_step, native_pairs)
    prefill, its_prefill = _prefill(ours, 2048, device), _prefill(native, 2048, device)
    yield Measure(f"{name}: prefill of 2,048", "transformers", prefill, its_prefill, targets.prefill)
    for context in (16, 512):
        decode, its_decode = _generate(ours, context, device), _generate(native, context, device)
        yield Measure(f"{name}: 64 tokens after {context}", "transformers", decode, its_decode, targets.decode)


# -- ops ---------------------------------------------------------------------------------------------------------


def _forward(op: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> Run:
    """Run an op without gradients."""

    @torch.no_grad()
    def run() -> None:
        op(**tensors)

    return run


def _forward_backward(op: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> Run:
    """Run an op and differentiate the sum of its first output by every floating-point tensor."""
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}

    def run() -> None:
        output = op(**leaves)
        output = output[0] if isinstance(output, tuple) else output
        output.sum().backward()
        for leaf in leaves.values():
            leaf.grad = None

    return run


def op_measures(
    name: str,
    peer: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    output: str = "x",
) -> Iterator[Measure]:
    """The forward of an op, and forward with backward, compared with its peer on the same tensors.

    Args:
        output: name of a tensor of the output's size. The forward is counted as reading all tensors and writing the
            output, the backward as twice that.
    """
    moved = sum(t.nbytes for t in tensors.values()) + tensors[output].nbytes
    alone = _forward(ours, tensors), _forward(theirs, tensors)
    yield Measure(f"{name}, forward", peer, *alone, bytes_moved=moved)
    both = _forward_backward(ours, tensors), _forward_backward(theirs, tensors)
    yield Measure(f"{name}, forward and backward", peer, *both, bytes_moved=3 * moved)


def sized(
    name: str,
    cases: Callable[..., Iterator[dict[str, Any]]],
    arguments: Sequence[str],
    shapes: Iterable[dict[str, int]],
    device: torch.device,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """For each shape, a label and the tensors named by ``arguments``, those that the op's peer has too.

    Args:
        cases: the function ``cases`` of the op. It is called with each shape, in bfloat16 on a GPU, else in float32.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in shapes:
        case = next(case for case in cases(device, dtype, **shape) if case.keys() >= {*arguments})
        label = ", ".join((name, *(f"{size} {value}" for size, value in shape.items())))
        yield label, {argument: case[argument] for argument in arguments}
