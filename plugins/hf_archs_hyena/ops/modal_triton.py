"""`modal_conv` on a GPU: batched matrix products within chunks, and one Triton kernel that passes the states.

The products of a channel's chunks with its small tables are those of `modal_portable`, in float32 throughout, since the
vendor's library computes them as fast as a kernel of ours could. The rest of the work is the recurrence over chunks,
which in PyTorch would take a launch or two per chunk. Here it is one kernel: each thread keeps a mode's state in
registers and loads several chunks at once, so every number is read and written once.

Letters: b batch, l length, c channels, n modes, q chunks.
"""

# to mypy, a tuple that grows in a kernel has another type at each length
# mypy: disable-error-code="assignment,var-annotated"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec
from hf_archs_hyena.ops import modal_portable as portable

CHUNK = 64  # half as many states as with 32, and still less work within chunks than between them
CONFIGS = [{"BLOCK": 32, "num_warps": 1, "num_stages": 2}]  # BLOCK states per program: few, as a program is sequential


@triton.jit(do_not_specialize=["chunks", "batch"])
def _pass_kernel(
    states,  # (c, q, b, n, 2), in place
    over,  # (c, n, 2)
    first,  # (c, b, n, 2): the initial state, or None; REVERSED: its gradient, which the kernel writes
    keep,  # (q, b) or None
    chunks,
    batch,
    MODES: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `modal_portable.pass_states`; REVERSED: as `modal_portable.pass_gradients`."""
    AHEAD: tl.constexpr = 4  # chunks that are loaded together, to overlap their latencies
    row = batch * MODES
    c = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < row
    b = element // MODES
    states += c * chunks * row * 2 + 2 * element
    over += (c * MODES + element % MODES) * 2
    factor_r = tl.load(over, inside, 0)
    factor_i = tl.load(over + 1, inside, 0)
    if REVERSED:
        factor_i = -factor_i
    state_r = tl.zeros((BLOCK,), tl.float32)
    state_i = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        first += c * row * 2 + 2 * element
        if not REVERSED:
            state_r = tl.load(first, inside, 0)
            state_i = tl.load(first + 1, inside, 0)
    for begin in range(0, chunks, AHEAD):
        reals, imaginaries, keeps = (), (), ()
        for ahead in tl.static_range(AHEAD):
            q = begin + ahead
            # not `inside & (q < chunks)`: Triton 3.9's interpreter rejects the dtype of a mask combined with a scalar
            there = tl.where(q < chunks, inside, False)
            if REVERSED:
                q = chunks - 1 - q
            place = states + tl.cast(q, tl.int64) * row * 2
            reals += (tl.load(place, there, 0),)
            imaginaries += (tl.load(place + 1, there, 0),)
            if keep is not None:
                keeps += (tl.load(keep + q * batch + b, there, 1),)
        for ahead in tl.static_range(AHEAD):
            q = begin + ahead
            there = tl.where(q < chunks, inside, False)
            if REVERSED:
                q = chunks - 1 - q
            if keep is not None and not REVERSED:
                state_r *= keeps[ahead]
                state_i *= keeps[ahead]
            place = states + tl.cast(q, tl.int64) * row * 2
            tl.store(place, state_r, there)
            tl.store(place + 1, state_i, there)
            new_r = reals[ahead] + factor_r * state_r - factor_i * state_i
            new_i = imaginaries[ahead] + factor_r * state_i + factor_i * state_r
            if keep is not None and REVERSED:
                new_r *= keeps[ahead]
                new_i *= keeps[ahead]
            state_r = tl.where(there, new_r, state_r)
            state_i = tl.where(there, new_i, state_i)
    if REVERSED:
        tl.store(first, state_r, inside)
        tl.store(first + 1, state_i, inside)


def _launch(states: Tensor, over: Tensor, first: Tensor | None, keep: Tensor | None, backwards: bool) -> None:
    c, q, b, n, _ = states.shape
    config = CONFIGS[0]
    grid = (c, triton.cdiv(b * n, config["BLOCK"]))
    with torch.accelerator.device_index(states.device.index):
        _pass_kernel[grid](states, over, first, keep, q, b, n, backwards, **config, **FUSED)


def pass_states(states: Tensor, over: Tensor, initial_state: Tensor | None, keep: Tensor | None) -> None:
    """As `modal_portable.pass_states`."""
    _launch(states, over, initial_state, keep, False)


def pass_gradients(grads: Tensor, over: Tensor, keep: Tensor | None) -> Tensor:
    """As `modal_portable.pass_gradients`."""
    grad_initial = torch.empty_like(grads[:, 0])
    _launch(grads, over, grad_initial, keep, True)
    return grad_initial


modal_conv_fwd = functools.partial(portable.modal_conv_fwd, passing=pass_states)
modal_conv_bwd = functools.partial(portable.modal_conv_bwd, passing=pass_states, passing_gradients=pass_gradients)


def aot_specs() -> list[KernelSpec]:
    """The kernel in both directions, without and with documents and an initial state."""
    config, specs = CONFIGS[0], []
    for backwards in (False, True):
        for everything in (False, True):
            constexprs: dict[str, object] = {"MODES": 16, "REVERSED": backwards, "BLOCK": config["BLOCK"]}
            if not everything:
                constexprs |= {"keep": None} if backwards else {"keep": None, "first": None}
            signature = {
                name: "constexpr" if name in constexprs else "i32" if name in ("chunks", "batch") else "*fp32"
                for name in _pass_kernel.arg_names
            }
            label = f"{'backward' if backwards else 'forward'}{' state documents' if everything else ''}"
            specs.append(
                KernelSpec(_pass_kernel, signature, constexprs, config["num_warps"], config["num_stages"], label)
            )
    return specs
