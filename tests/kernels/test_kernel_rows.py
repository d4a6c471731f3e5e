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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, HIDDEN, ADDED, SLOTS = 50, 96, 3, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


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
