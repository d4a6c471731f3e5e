"""The model of how programs of base and deltas share a card, and the order in which decode's launches start them."""

from pathlib import Path

import pytest
import torch

from meswitch_kernels.testing import random_call
from meswitch_kernels.tuning import LaunchSettings

np = pytest.importorskip("numpy")
pytest.importorskip("triton")
FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import overlap_model

    return overlap_model


@pytest.fixture
def rates(model):
    """Four processors: 100 bytes a second of all, 10 instructions a second of each."""
    return model.Rates(bandwidth=100.0, issue=10.0, of_program=5.0, processors=4)


def test_what_one_cannot_use_goes_to_others(model):
    wanted = np.array([[1.0, 9.0], [5.0, 1.0], [20.0, 1.0]])
    assert model._fair(wanted, 12.0).tolist() == [[1.0, 9.0], [5.0, 1.0], [6.0, 1.0]]
    assert model._fair(np.array([[4.0], [7.0], [7.0]]), 9.0).tolist() == [[3.0], [3.0], [3.0]]


def test_programs_alike_take_what_bounds_them(model, rates):
    memory, issue = np.array([[50.0, 0.01]]), np.array([[0.01, 20.0]])
    assert model.seconds(memory.repeat(160, 0), rates) == pytest.approx(160 * 50 / 100, rel=1e-3)
    assert model.seconds(issue.repeat(160, 0), rates) == pytest.approx(160 * 20 / 40, rel=1e-3)
    assert model.seconds(issue, rates) == pytest.approx(20 / 5, rel=1e-3)  # alone, it has no more than its share


def test_programs_that_alternate_overlap(model, rates):
    """In turn they would take the sum, at best the longer of the two."""
    of_each = np.array([[50.0, 0.01], [0.01, 20.0]])
    apart, mixed = (model.seconds(work, rates) for work in (of_each.repeat(160, 0), np.tile(of_each, (160, 1))))
    assert mixed == pytest.approx(80, rel=0.1)  # the last ones run alone
    assert apart > 1.5 * mixed


def test_both_orders_have_the_same_programs(model):
    first, blocks = (model.programs(4096, 4096, 0.25, 16, 0.9, rows_first) for rows_first in (True, False))
    assert np.allclose(np.sort(first, 0), np.sort(blocks, 0))
    assert first[:64, 0].std() == 0 and blocks[:64, 0].std() > 0
    weights = 4096 * 4096
    assert first[:, 0].sum() == pytest.approx(2 * weights + 16 * model.delta_bytes(4096, 4096, 0.25, rank=16))
    assert first[:, 1].sum() == pytest.approx((model.BASE_INSTRUCTIONS + 16 * 0.9) * weights / 32)


def test_a_launch_starts_block_by_block_of_rows(needs_triton, monkeypatch):
    """So that base and deltas alternate: the axis that a card counts first holds a block's programs."""
    from meswitch_kernels import triton_launch, triton_ops

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: grids.append(grid)

    for name in ("decode", "decode_siblings"):
        monkeypatch.setattr(triton_launch, name, Recorder())
    monkeypatch.setattr(triton_launch, "launch_settings", lambda *_: LaunchSettings(32, 32, 2, 2, 2, 1, 3))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = random_call(5, 64, 160, device=device, planes=True)
    operand = call.weight, call.bias, call.bank.tensors
    groups = triton_ops.group_tokens(call.slot_of_token, call.bank.slots)
    triton_ops.expert_linear(call.x, *operand, call.slot_of_token, groups)
    triton_ops.expert_linears(call.x, [operand, operand], call.slot_of_token, groups)
    assert grids == [(2 + 3, 5), (2 + 3, 5, 2)]
