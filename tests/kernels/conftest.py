"""Kernel tests run on a GPU where there is one; elsewhere Triton interprets its kernels on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["naive", "cpu", "triton"])
def backend(request):
    """Each backend that this machine has."""
    from meswitch_kernels import available_backends

    if reason := available_backends()[request.param]:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def needs_triton():
    """Skips where Triton cannot run, and says why."""
    from meswitch_kernels import available_backends

    if reason := available_backends()["triton"]:
        pytest.skip(reason)


@pytest.fixture
def triton(needs_triton):
    """The backend's module."""
    from meswitch_kernels.dispatch import backend_module

    return backend_module("triton")


def device_of(backend):
    """Where a backend's tensors lie: Triton's on the GPU, if there is one."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def check(call, backend, groups=None):
    """Multiply by a backend, compare with the truth, and return the product."""
    from meswitch_kernels import expert_linear
    from meswitch_kernels.testing import ERROR_BOUND, relative_error

    y = expert_linear(call.x, call.weight, call.bias, call.bank, call.slot_of_token, groups, backend)
    assert y.dtype == call.x.dtype
    assert y.shape == (len(call.x), call.bank.out_features)
    assert relative_error(y, call.truth()) < ERROR_BOUND[call.x.dtype]
    return y


@pytest.fixture(autouse=True, scope="session")
def triton_interpreter_repairs():
    """Three holes in the interpreter of Triton 3.6, mended for the tests alone.

    It takes loop bounds by `int(one_element_array)`, which numpy 2.4 refuses; it multiplies the bit patterns
    of bfloat16 operands of `tl.dot` as if they were integers; and it cuts float32 off to bfloat16 where a GPU
    rounds to nearest.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot
    cast = interpreter.InterpreterBuilder.cast_impl

    def patched_tensor(tensor, *arguments):
        patch_tensor(tensor, *arguments)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def patched_cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            data = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast(self, source, target)

    def patched_dot(self, a, b, *arguments):
        return create_dot(self, widened(a), widened(b), *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", patched_dot)
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", patched_cast)
        yield
