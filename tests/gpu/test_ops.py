"""Every op's Triton form on a real GPU, on the cases beside it: outputs and all gradients against the float64
reference, and compiled.
"""

import pytest
import torch

import hf_archs
from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, ops_with_cases

pytestmark = pytest.mark.gpu
assert hf_archs  # which loads the plugins, and they their ops
DEVICE = "cuda"
every_op = pytest.mark.parametrize("op", ops_with_cases(), ids=lambda op: op.name)


def cases(op, dtype, length):
    return op.cases(DEVICE, dtype, **op.model_sizes | {"length": length})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 65, 300])
@every_op
def test_equals_reference(op, length, dtype):
    for case in cases(op, dtype, length):
        tensors = {name: value for name, value in case.items() if isinstance(value, torch.Tensor)}
        with use_backend("triton"):
            check_op(op.function, op.reference, tensors, {k: v for k, v in case.items() if k not in tensors})


@every_op
def test_compiles_once_for_all_lengths(op):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(op.function, backend=counter, fullgraph=True, dynamic=True)
    for length in (64, 96, 200):
        case = cases(op, torch.bfloat16, length)[0]
        torch.testing.assert_close(compiled(**case), op.function(**case))
    assert counter.frame_count == 1
