"""What an expert switches besides linears: embedding rows, norms, head, bias."""

import pytest
import torch

from meswitch_kernels import (
    Capacity,
    ExpertBank,
    GainBank,
    available_backends,
    expert_embedding,
    expert_head,
)
from meswitch_kernels.dispatch import backend_module
from meswitch_kernels.testing import ERROR_BOUND, random_expert, relative_error

from .conftest import device_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, HIDDEN, ADDED, SLOTS = 50, 96, 3, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def skip_unsupported(backend, dtype):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("float16 on the CPU is the naive backend's")


def vocabulary_bank(group_size=0, device="cpu"):
    """Slot 0: 2 bits and no added row; slot 1: 4 bits and one; slot 2: 1 bit and all three."""
    capacity = Capacity(bits=4, group_size=group_size, salient=8, added_rows=ADDED, channel_scale=True)
    bank = ExpertBank(SLOTS, HIDDEN, VOCAB, capacity, torch.float32, device)
    for slot, (bits, added) in enumerate([(2, 0), (4, 1), (1, ADDED)]):
        bank.load(
            slot,
            random_expert(
                slot, HIDDEN, VOCAB, bits, group_size, k=slot, channel_scale=slot == 1, bias=slot == 2, added=added
            ),
        )
    return bank


def weights(dtype):
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding_rows(backend, dtype, group_size, ids_dtype):
    skip_unsupported(backend, dtype)
    bank, weight = vocabulary_bank(group_size), weights(dtype)
    ids = torch.tensor([0, 49, 7, 7, 7, 50, 51, 52, 50], dtype=ids_dtype)
    slots = torch.tensor([-1, 0, 0, 1, 2, 2, 2, 2, 1], dtype=torch.int32)
    expected = torch.stack(
        [
            bank.added_rows[slot, i - VOCAB].double()
            if i >= VOCAB
            else weight[i].double() + (bank.dequantize(slot, torch.float64)[i] if slot >= 0 else 0)
            for i, slot in zip(ids.tolist(), slots.tolist(), strict=True)
        ]
    )
    device = device_of(backend)
    served = vocabulary_bank(group_size, device)
    y = expert_embedding(ids.to(device), weight.to(device), served, slots.to(device), backend)
    assert y.dtype == dtype
    assert relative_error(y, expected) < ERROR_BOUND[dtype]


def test_an_id_outside_its_experts_vocabulary_is_refused():
    bank, weight = vocabulary_bank(), weights(torch.float32)
    for index, slot in [(50, -1), (50, 0), (51, 1), (-1, 2)]:
        with pytest.raises(IndexError, match=f"id {index} of token 0"):
            expert_embedding(torch.tensor([index]), weight, bank, torch.tensor([slot], dtype=torch.int32))
    with pytest.raises(TypeError, match="ids"):
        expert_embedding(torch.tensor([0.0]), weight, bank, torch.tensor([0], dtype=torch.int32))


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_with_a_low_rank_part(backend, bits, dtype):
    """Slots with one, without, and with added rows; in a bank with codes and in one without."""
    device = device_of(backend)
    bank = ExpertBank(3, HIDDEN, VOCAB, Capacity(bits=bits, salient=8, rank=4, added_rows=ADDED), dtype, device)
    for slot, (own_bits, rank, added) in enumerate([(0, 4, 0), (bits, 0, 2), (bits, 3, ADDED)]):
        bank.load(slot, random_expert(slot, HIDDEN, VOCAB, own_bits, rank=rank, added=added))
    weight = weights(dtype).to(device)
    ids = torch.tensor([0, 49, 49, 7, 51, 52, 7], device=device)
    slots = torch.tensor([0, 0, -1, 1, 1, 2, 2], dtype=torch.int32, device=device)
    expected = torch.stack([
        bank.added_rows[slot, i - VOCAB].double()
        if i >= VOCAB
        else weight[i].double() + (bank.dequantize(slot, torch.float64)[i] if slot >= 0 else 0)
        for i, slot in zip(ids.tolist(), slots.tolist(), strict=True)
    ])  # fmt: skip
    y = expert_embedding(ids, weight, bank, slots, backend)
    assert y.dtype == dtype
    assert relative_error(y, expected) < ERROR_BOUND[dtype]
    assert bank.dequantize(0).norm() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gains_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [HIDDEN, 7, 1100, 5000], ids=str)  # Triton takes up to 1,024 of several rows
def test_norms_with_the_gains_of_each_expert(backend, dtype, gains_dtype, width):
    """The base's gain may be 0 where an expert's is not: they are gains, not ratios to the base's."""
    skip_unsupported(backend, dtype)
    device = device_of(backend)
    rng = torch.Generator().manual_seed(width)
    base, own = (torch.rand(width, generator=rng).add(0.5).to(gains_dtype) for _ in range(2))
    base[:3] = 0
    gains = GainBank(3, base.to(device))
    gains.load(0, own)
    gains.load(1, None)
    x = torch.randn(6, 2 * width, generator=rng).to(dtype)[:, ::2]
    x[0] *= 1e-4  # as small as the root of epsilon
    slots = torch.tensor([0, -1, 1, 0, -1, 2])
    y = backend_module(backend).rms_norm(x.to(device), 1e-6, gains.table, slots.to(device) + 1).cpu()
    wide = x.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt()
    # The quotient is rounded to the type of x before gains of that type; the bound is of the rounding after it.
    expected = (normed.to(dtype) if gains_dtype == dtype else normed).double() * torch.where(
        slots[:, None] == 0, own.double(), base.double()
    )
    assert y.dtype == dtype
    assert relative_error(y[:5], expected[:5]) < ERROR_BOUND[dtype]
    # Sums in another order may turn a rounding the other way.
    rtol = 2e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(y[:5].double(), expected[:5], rtol=rtol, atol=1e-6)
    assert y[5].isnan().all()  # an empty slot


@pytest.mark.parametrize(("family", "offset"), [("llama.LlamaRMSNorm", 0.0), ("gemma2.Gemma2RMSNorm", 1.0)])
def test_a_norm_rounds_where_its_family_does(backend, family, offset):
    """Llama's before its gain, Gemma's after, whose gains the engine holds in float32."""
    package, name = family.split(".")
    modeling = pytest.importorskip(f"transformers.models.{package}.modeling_{package}")
    norm = getattr(modeling, name)(HIDDEN, eps=1e-6).to(torch.bfloat16)
    rng = torch.Generator().manual_seed(1)
    norm.weight.data = torch.randn(HIDDEN, generator=rng).to(torch.bfloat16)
    x = torch.randn(200, HIDDEN, generator=rng).to(torch.bfloat16)
    gain = norm.weight.data.float() + offset if offset else norm.weight.data
    device = device_of(backend)
    rows = torch.zeros(len(x), dtype=torch.int64, device=device)
    y = backend_module(backend).rms_norm(x.to(device), 1e-6, gain[None].to(device), rows).cpu()
    # Sums in another order turn a rounding the other way now and then; rounding at another place turns a third.
    assert float((y != norm(x)).float().mean()) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (17, 128), (3, 2000)])
def test_a_norm_of_one_gain(triton, dtype, rows, width):
    """A batch without experts gives the bytes that its tokens have beside experts."""
    rng = torch.Generator().manual_seed(width)
    x = torch.randn(rows, 2 * width, generator=rng).to(DEVICE, dtype)[:, width:]
    gains = GainBank(1, torch.randn(width, generator=rng).to(DEVICE, dtype))
    nobody = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    y = triton.base_norm(x, 1e-5, gains.table[0])
    assert torch.equal(y, triton.rms_norm(x, 1e-5, gains.table, nobody))
    exact = backend_module("naive").rms_norm(x.double(), 1e-5, gains.table.double(), nobody)
    assert relative_error(y, exact.cpu()) < (2e-6 if dtype == torch.float32 else 6e-3)


def test_gain_bank_refuses_what_does_not_fit():
    base = torch.rand(HIDDEN)
    gains = GainBank(2, base)
    assert gains.nbytes == 3 * HIDDEN * 4
    with pytest.raises(ValueError, match="the gains have shape"):
        gains.load(0, torch.ones(HIDDEN + 1))
    with pytest.raises(IndexError, match="slot 2"):
        gains.load(2, None)
    assert torch.equal(gains.table[0], base) and gains.table[1:].isnan().all()
    gains.load(1, None)
    assert torch.equal(gains.table[2], base)
    gains.clear(1)
    assert gains.table[1:].isnan().all()
    with pytest.raises(TypeError, match="float64"):
        GainBank(2, base.double())
    with pytest.raises(ValueError, match=r"not 2 and \[1, 96\]"):
        GainBank(2, base[None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_with_added_vocabulary(backend, dtype):
    """Tied weights: the bank of the embedding serves the head."""
    skip_unsupported(backend, dtype)
    bank, weight = vocabulary_bank(), weights(dtype)
    x = torch.randn(6, HIDDEN).to(dtype)
    slots = torch.tensor([2, -1, 0, 1, 2, 1], dtype=torch.int32)
    device = device_of(backend)
    served = vocabulary_bank(device=device)
    logits = expert_head(x.to(device), weight.to(device), None, served, slots.to(device), backend=backend).cpu()
    assert logits.shape == (6, VOCAB + ADDED)
    for t, slot in enumerate(slots.tolist()):
        full, added = weight.double(), 0
        bias = torch.zeros(VOCAB + ADDED, dtype=torch.float64)
        if slot >= 0:
            added = int(bank.added_counts[slot])
            full = torch.cat([full + bank.dequantize(slot, torch.float64), bank.added_rows[slot, :added].double()])
            bias[:VOCAB] += bank.tensors.bias_delta[slot]
        expected = full @ x[t].double() + bias[: VOCAB + added]
        assert relative_error(logits[t, : VOCAB + added], expected) < ERROR_BOUND[dtype]
        assert (logits[t, VOCAB + added :] == -torch.inf).all()


def test_empty_batches(backend):
    device = device_of(backend)
    none, nobody = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    bank, weight, x = (
        vocabulary_bank(device=device),
        weights(torch.float32).to(device),
        torch.zeros(0, HIDDEN, device=device),
    )
    assert expert_embedding(none, weight, bank, nobody, backend).shape == (0, HIDDEN)
    table = GainBank(1, torch.ones(HIDDEN, device=device)).table
    assert backend_module(backend).rms_norm(x, 1e-6, table, nobody.long() + 1).shape == (0, HIDDEN)
    assert expert_head(x, weight, None, bank, nobody, backend=backend).shape == (0, VOCAB + ADDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 96), (3, 7), (300, 576)])
def test_rms_norm_with_each_rows_own_gain(dtype, table_dtype, rows, width):
    """The cpu backend against plain PyTorch: equal but for sums, which may turn a rounding the other way."""
    if available_backends()["cpu"]:
        pytest.skip("needs numba")
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 2 * width, generator=rng).to(dtype)[:, :width]
    x[0] *= 1e-4  # as small as the root of epsilon
    table = torch.randn(SLOTS + 1, width, generator=rng).to(table_dtype)
    gain_rows = torch.arange(rows) % (SLOTS + 1)
    expected = backend_module("naive").rms_norm(x, 1e-6, table, gain_rows)
    y = backend_module("cpu").rms_norm(x, 1e-6, table, gain_rows)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-6 if dtype == torch.float32 else 2**-6, atol=1e-6)
    exact = backend_module("naive").rms_norm(x.double(), 1e-6, table.double(), gain_rows)
    assert relative_error(y, exact) < (2e-6 if dtype == torch.float32 else 6e-3)
