"""Ops in PyTorch's op library: `Op` registers an op with its backward, its fake (the shapes of its results), and its
form for exporters.

PyTorch's schemas have no optional results, so an op returns an empty tensor for one that is absent.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_archs.kernels.backend import backend_for, is_transformed
from hf_archs.kernels.numerics import full_precision

OPS: dict[str, "Op"] = {}  # by the name in PyTorch's library


def _nothing(tensors: Any) -> bool:
    """Whether no tensor has an element, as in an empty batch."""
    return all(t is None or t.numel() == 0 for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


@torch.compiler.assume_constant_result  # so that a traced op may read the module's constants
def form(op: str, backend: str) -> Any:
    """The module of an op's form: for the op module ``x``, ``x_triton`` or ``x_portable``.

    The form is imported at its first use, since Triton may be absent.
    """
    return importlib.import_module(f"{op}_{backend}")


class Op:
    """``hf_archs::<name>`` and ``hf_archs::<name>_backward``, computed by ``<name>_fwd`` and ``<name>_bwd``.

    The form is chosen at the call of the forward, for the backward too. Both run with autocast off and on the device of
    the first tensor. The op can be differentiated once. ``<name>_bwd`` takes the gradients of the results (None if a
    result has no gradient), the tensors, the kept result, the options and ``wanted``, a bool for each learnt tensor. It
    returns a gradient for each learnt tensor; None means zeros, and a gradient that is not wanted may be anything.

    Args:
        module: the name of the public function's module, which also has the op's ``cases``.
        schema: name, arguments and results. Tensors come before options. If the last option is ``bool keep``, the last
            result is for the backward only, and may be empty unless ``keep``.
        fake: the forward on shapes. Its last argument is the backend of the form.
        learnt: names of the tensors that have gradients.
        unread: names of the learnt tensors whose values the backward does not need; they are not saved for it and not
            passed to it.
        float64: whether the Triton form supports float64; if not, float64 tensors take the portable form.
        only: the backend of the only form; None if there are two.
        waits: whether the op waits for values from a GPU. A CUDA graph cannot, so torch.compile leaves the op out of
            CUDA graphs.
        plain: the op in PyTorch's own operators, for exporters and `torch.func`, which support no others; None if the
            public function handles these.
    """

    def __init__(
        self,
        module: str,
        schema: str,
        fake: Callable[..., Any],
        learnt: tuple[str, ...],
        unread: tuple[str, ...] = (),
        float64: bool = True,
        only: str | None = None,
        waits: bool = False,
        plain: Callable[..., Any] | None = None,
    ) -> None:
        self.module, self.fake, self.float64, self.only, self.plain = module, fake, float64, only, plain
        self.short, arguments = schema.split("(", 1)
        arguments, results = arguments.split(") -> ")
        self.name, declared = f"hf_archs::{self.short}", arguments.split(", ")
        names = [argument.split()[-1] for argument in declared]
        self.tensors = sum(argument.startswith("Tensor") for argument in declared)
        self.keeps = names[-1] == "keep"
        self.results = results.count("Tensor") - self.keeps
        self.learnt = [names.index(tensor) for tensor in learnt]
        self.unread = {names.index(tensor) for tensor in unread}

        tags = (torch.Tag.cudagraph_unsafe,) if waits else ()
        schema = f"({arguments}, str backend) -> {results}"
        forward_op = torch.library.custom_op(self.name, self.run, mutates_args=(), schema=schema, tags=tags)
        forward_op.register_fake(fake)
        optional = "?" if self.results > 1 else ""
        taken = [f"Tensor{optional} grad_{result}" for result in range(self.results)] + declared[: self.tensors]
        taken += ["Tensor kept"] * self.keeps + declared[self.tensors : len(declared) - self.keeps]
        schema = f"({', '.join(taken)}, str backend, bool[] wanted) -> Tensor[]"
        backward_op = torch.library.custom_op(
            f"{self.name}_backward", self._backward, mutates_args=(), schema=schema, tags=tags
        )
        backward_op.register_fake(self._fake_gradients)
        forward_op.register_autograd(self._differentiate, setup_context=self._save)
        backward_op.register_autograd(self._refuse)
        self.op, self.backward_op = (op._opoverload for op in (forward_op, backward_op))
        OPS[self.name] = self

    def __call__(self, *arguments: Any) -> Any:
        """The results without the one for the backward. ``keep`` is no argument: it is true if gradients are needed."""
        if self.plain is not None and (torch.compiler.is_exporting() or is_transformed()):
            with full_precision(arguments[0]):
                return self.plain(*arguments)
        tensors = arguments[: self.tensors]
        backend = self.backend(*tensors)
        if not self.keeps:
            return self.op(*arguments, backend)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        results = self.op(*arguments, keep, backend)
        return results[0] if self.results == 1 else results[:-1]

    def backend(self, x: Tensor, *tensors: Tensor | None) -> str:
        """The name of the form that computes with these tensors."""
        is_wide = any(t is not None and t.dtype == torch.float64 for t in (x, *tensors))
        return self.only or ("portable" if is_wide and not self.float64 else backend_for(x))

    def run(self, *arguments: Any) -> Any:
        """The forward itself, which PyTorch's library calls; a direct call avoids the library's overhead."""
        x = arguments[0]
        if x.numel() == 0 and _nothing(empty := self.fake(*arguments)):
            return empty
        with full_precision(x), torch.accelerator.device_index(x.device.index):
            return self.forward(*arguments)

    def forward(self, *arguments: Any) -> Any:
        """The results of the form's forward."""
        *inputs, backend = arguments
        return getattr(form(self.module, backend), f"{self.short}_fwd")(*inputs)

    def backward(self, *arguments: Any) -> Sequence[Tensor | None]:
        """The gradients of the form's backward."""
        *inputs, backend, wanted = arguments
        read = [t for place, t in enumerate(inputs, -self.results) if place not in self.unread]
        return getattr(form(self.module, backend), f"{self.short}_bwd")(*read, wanted)

    def _backward(self, *arguments: Any) -> list[Tensor]:
        inputs, wanted = arguments[self.results :], arguments[-1]
        if _nothing(arguments[: self.results]):
            return [gradient.zero_() for gradient in self._fake_gradients(*arguments)]
        with full_precision(inputs[0]), torch.accelerator.device_index(inputs[0].device.index):
            gradients = self.backward(*arguments)
        found = []
        for gradient, place, asked in zip(gradients, self.learnt, wanted, strict=True):
            if not asked:
                found.append(inputs[0].new_empty(0))
            elif gradient is None:
                found.append(torch.zeros_like(inputs[place], memory_format=torch.contiguous_format))
            else:
                found.append(gradient.to(inputs[place].dtype).contiguous())
        return found

    def _fake_gradients(self, *arguments: Any) -> list[Tensor]:
        inputs, wanted = arguments[self.results :], arguments[-1]
        learnt = [inputs[place] if asked else None for place, asked in zip(self.learnt, wanted, strict=True)]
        return [inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in learnt]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        tensors = [
            t.new_empty(()).expand(t.shape) if place in self.unread and t is not None else t
            for place, t in enumerate(inputs[: self.tensors])
        ]
        ctx.save_for_backward(*tensors, *([output[-1]] if self.keeps else []))
        ctx.options = [*inputs[self.tensors : len(inputs) - 1 - self.keeps], inputs[-1]]

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        grads, wanted = grads[: self.results], [ctx.needs_input_grad[place] for place in self.learnt]
        if any(grad is not None for grad in grads):
            # read ctx.saved_tensors only once: gradient checkpointing, which recomputes them, raises on a second read
            found = self.backward_op(*grads, *ctx.saved_tensors, *ctx.options, wanted)
            for place, asked, gradient in zip(self.learnt, wanted, found):
                gradients[place] = gradient if asked else None
        return tuple(gradients)

    def _refuse(self, ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{self.name}_backward: the op can be differentiated once; allowed for second derivatives are torch.func "
            "(jvp of grad, hessian) and hf_archs.kernels.backend.use_backend('reference')"
        )
