"""Registration and dispatch: tracing, fake tensors, the choice of a backend."""

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch

from meswitch_kernels import dispatch, expert_head, expert_linear, group_tokens
from meswitch_kernels.testing import random_call


@pytest.fixture
def fresh_dispatch():
    caches = (dispatch.default_backend, dispatch.unavailable_reason, dispatch.checked_backend)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_operators_pass_torchs_own_checks():
    call = random_call(5, 64, 24, bits=(1, 2), bias=True, channel_scale=True, dtype=torch.float32, rank=(3, 0))
    groups = group_tokens(call.slot_of_token, 4)
    packed = [groups.order, groups.tile_slot, groups.tile_start, groups.tile_count]
    arguments = (call.x, call.weight, call.bias, *call.bank.tensors, call.slot_of_token, packed, 16, "naive")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.meswitch.expert_linear.default, arguments, test_utils=tests)
    ids = torch.zeros(5, dtype=torch.int64)
    arguments = (ids, call.weight, *call.bank.tensors, call.bank.added_rows, call.slot_of_token, "naive")
    torch.library.opcheck(torch.ops.meswitch.expert_embedding.default, arguments, test_utils=tests)


@pytest.mark.parametrize("rank", [0, (8, 0, 3)], ids=str)
def test_torch_compile_traces_a_layer_in_one_graph(rank):
    call = random_call(5, 64, 24, bits=2, dtype=torch.float32, rank=rank)
    groups = group_tokens(call.slot_of_token, 4)

    def layer(x, slots):
        return expert_linear(x, call.weight, None, call.bank, slots, groups).relu() + 1

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(call.x, call.slot_of_token), layer(call.x, call.slot_of_token), rtol=0, atol=0)


def test_fake_tensors_get_shapes_without_a_kernel():
    call = random_call(5, 64, 24)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = torch.ops.meswitch.expert_linear(
            mode.from_tensor(call.x), call.weight, None, *call.bank.tensors, call.slot_of_token, [], 0, "naive"
        )
    assert y.shape == (5, 24)
    assert y.dtype == torch.bfloat16


def test_triton_launches_on_the_card_of_its_tensors(needs_triton, monkeypatch):
    """Each entry point makes its first argument's card the current one; a new thread's is the first card."""
    from meswitch_kernels import triton_groups, triton_ops, triton_planes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = random_call(2, 64, 32, dtype=torch.float32, device=device)
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    added = torch.zeros(4, 1, 64, device=device)
    counts, rows = torch.zeros(4, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    slots, bank = call.slot_of_token, call.bank.tensors
    turned, angles = torch.zeros(1, 2, 2, 32, device=device), torch.zeros(1, 2, 32, device=device)
    heads, pages = torch.zeros(2, 2, 32, device=device), torch.zeros(16, 64, device=device)
    table, zero = torch.zeros(2, 1, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    prompts = torch.tensor([[0, 2, 0, 0]], dtype=torch.int32, device=device)
    words = torch.zeros(4, 32, dtype=torch.int32, device=device)
    groups = triton_ops.group_tokens(slots, bank.slot_bits.shape[0])
    entries = {
        "expert_linear": (triton_ops, (call.x, call.weight, None, bank, slots)),
        "summed_linear": (
            triton_ops,
            (torch.zeros(2, 32, device=device), call.x, call.weight, None, bank, slots, groups),
        ),
        "expert_embedding": (triton_ops, (ids, call.weight, bank, added, slots)),
        "added_logits": (triton_ops, (call.x, added, counts, slots)),
        "rms_norm": (triton_ops, (call.x, 1e-5, torch.ones(1, 64, device=device), rows)),
        "base_norm": (triton_ops, (call.x, 1e-5, torch.ones(64, device=device))),
        "rotate": (triton_ops, (turned, turned, angles, angles)),
        "silu_product": (triton_ops, (call.x, call.x)),
        "expert_linears": (triton_ops, (call.x, [(call.weight, None, bank)] * 2, slots, groups)),
        "paged_attention": (triton_ops, (heads, heads, heads, pages, pages.clone(), table, zero, 8, 1.0)),
        "prompt_attention": (
            triton_ops,
            (heads, heads, heads, pages, pages.clone(), table, prompts, [2], 8, 1.0, torch.empty_like(heads)),
        ),
        "to_planes": (triton_planes, (words, 1, torch.empty_like(words))),
        "sort_tokens": (triton_groups, (slots, 4, 16, 2)),
    }
    guards = {name for name, item in vars(triton_ops).items() if hasattr(item, "__wrapped__") and name[0] != "_"}
    assert guards <= entries.keys()
    for name, (module, arguments) in entries.items():
        guarded = []

        def device_of(tensor, guarded=guarded):
            guarded.append(tensor)
            return contextlib.nullcontext()

        monkeypatch.setattr(torch.cuda, "device_of", device_of)
        getattr(module, name)(*arguments)
        assert guarded and guarded[0] is arguments[0], name


def test_a_gpu_left_to_the_naive_backend_is_told_of(monkeypatch, fresh_dispatch):
    monkeypatch.delenv("MESWITCH_KERNEL", raising=False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="the package triton, which is not installed; the naive backend serves"):
        assert dispatch.default_backend("cuda") == "naive"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.default_backend("mps") == "naive"


def test_the_environment_chooses_the_backend(monkeypatch, fresh_dispatch):
    monkeypatch.setenv("MESWITCH_KERNEL", "naive")
    assert dispatch.default_backend("cpu") == "naive"


def test_an_unknown_name_in_the_environment_is_named(monkeypatch, fresh_dispatch):
    monkeypatch.setenv("MESWITCH_KERNEL", "metal")
    with pytest.raises(ValueError, match="MESWITCH_KERNEL=metal: unknown backend 'metal'"):
        dispatch.default_backend("cpu")


def test_without_numba_the_naive_backend_serves_and_says_why(monkeypatch, fresh_dispatch):
    find = dispatch.importlib.util.find_spec
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    assert dispatch.default_backend("cpu") == "naive"
    assert "numba, which is not installed" in dispatch.available_backends()["cpu"]
    with pytest.raises(RuntimeError, match="numba"):
        dispatch.checked_backend("cpu", "cpu")


@pytest.mark.skipif(bool(dispatch.available_backends()["cpu"]), reason="needs numba")
def test_float16_on_the_cpu_falls_back_unless_the_backend_is_named():
    call = random_call(2, 64, 8, dtype=torch.float16)
    arguments = (call.x, call.weight, None, call.bank, call.slot_of_token)
    default = expert_linear(*arguments)
    torch.testing.assert_close(default, expert_linear(*arguments, backend="naive"), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"cpu backend does not take torch\.float16"):
        expert_linear(*arguments, backend="cpu")


def test_importing_the_package_loads_no_backend():
    code = "import sys, meswitch_kernels; print([m for m in ('numba', 'triton.language') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numba" not in done.stdout


def test_a_head_without_added_rows_is_a_linear():
    call = random_call(3, 64, 8)
    arguments = (call.x, call.weight, None, call.bank, call.slot_of_token)
    torch.testing.assert_close(expert_head(*arguments), expert_linear(*arguments), rtol=0, atol=0)
