"""Steps that read prompts: which tokens go through which kernel, and that the answers are the same."""

import itertools

import pytest
import torch

from meswitch_kernels import tuning
from meswitch_kernels.groups import group_tokens
from meswitch_kernels.prefill_plan import DECODE_TOKENS, plan_prefill
from meswitch_kernels.testing import ERROR_BOUND, random_call, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def slots_of(runs):
    return torch.tensor([slot for slot, length in runs for _ in range(length)], dtype=torch.int32, device=DEVICE)


def plan(*runs, merge=100):
    return plan_prefill(group_tokens(slots_of(runs), SLOTS), runs, merge)


def places(rows, tokens):
    return torch.arange(tokens)[rows.cpu() if isinstance(rows, torch.Tensor) else rows].tolist()


def test_a_long_prompt_does_not_cost_its_neighbours_a_tile():
    made = plan((-1, 1), (0, 300), (1, 1), (2, 1), (3, 70))
    assert [slot for slot, _ in made.merged] == [0]
    (few,) = made.parts
    assert places(few.rows, 373) == [0, *range(301, 373)]
    assert few.groups.slot_of_token.tolist() == [-1, 1, 2] + [3] * 70
    assert few.groups.tile_size == 16


def test_decode_takes_no_more_tokens_at_once_than_its_sums_have_memory_for():
    made = plan((0, 90), (1, 90), (2, 90), (3, 5), merge=100)
    assert not made.merged
    assert [part.groups.slot_of_token.unique().tolist() for part in made.parts] == [[0, 1], [2, 3]]
    (whole,) = plan((3, 300), merge=400).parts  # a slot is not divided
    assert whole.rows == slice(0, 300)


def test_several_prompts_of_a_slot_are_merged_once():
    made = plan((0, 60), (2, 3), (0, 60), (-1, 70), (0, 5))
    assert [slot for slot, _ in made.merged] == [-1, 0]
    assert places(made.merged[0][1], 198) == list(range(123, 193))
    assert places(made.merged[1][1], 198) == [*range(60), *range(63, 123), *range(193, 198)]
    assert places(made.parts[0].rows, 198) == [60, 61, 62]


def test_neighbours_are_not_copied():
    made = plan((-1, 5), (0, 60), (0, 60), (2, 3), (3, 4))
    assert made.merged == ((0, slice(5, 125)),)
    assert plan((2, 3), (-1, 5), (0, 120), (3, 4)).merged == ((0, slice(8, 128)),)
    assert plan((2, 3), (-1, 5), (0, 120)).parts[0].rows == slice(0, 8)


@pytest.mark.parametrize(
    "runs",
    [[(0, 1), (1, 1), (-1, 1)], [(0, 99)], [(2, 0), (1, 60), (3, 30)]],
    ids=["decode", "short", "empty-run"],
)
def test_no_plan_for_few_tokens(runs):
    assert plan(*runs) is None


@pytest.mark.parametrize("runs", [[(0, 128)], [(s, 40) for s in range(SLOTS)]], ids=["all-merged", "all-few"])
def test_a_plan_of_one_part(runs):
    made = plan(*runs)
    assert len(made.merged) + len(made.parts) == 1


def test_runs_that_are_not_the_tokens_are_refused():
    groups = group_tokens(slots_of([(0, 5)]), SLOTS)
    with pytest.raises(ValueError, match="4 tokens, the groups 5"):
        plan_prefill(groups, [(0, 4)], 100)
    with pytest.raises(IndexError, match="slot 4"):
        plan_prefill(groups, [(4, 5)], 100)


def check(call, runs, triton, monkeypatch, merge):
    monkeypatch.setattr(triton, "merge_tokens", lambda device: merge)
    call = call.with_tokens(call.x, slots_of(runs))
    groups = triton.group_tokens(call.slot_of_token, call.bank.slots, runs)
    y = triton.expert_linear(call.x, call.weight, call.bias, call.bank.tensors, call.slot_of_token, groups)
    assert relative_error(y, call.truth()) < ERROR_BOUND[call.x.dtype]
    return groups.plan


@pytest.mark.parametrize("case", range(18))
def test_merged_weights_cover_formats_and_shapes(case, triton, monkeypatch):
    """A covering array of formats; every other case merges the weights in blocks of rows."""
    width, out_features = [(200, 37), (64, 70), (31, 3), (288, 66), (1024, 33), (576, 65), (1100, 5)][case % 7]
    if case % 2:
        monkeypatch.setattr("meswitch_kernels.triton_merge.MERGE_BYTES", 1)
    runs = [(0, 6), (-1, 2), (1, 7), (2, 6), (0, 3)]
    call = random_call(
        24,
        width,
        out_features,
        bits=[1, 2, 4, (1, 2, 4)][case % 4],
        group_size=[0, 32, 96][case * 2 % 3],
        k=[0, 1, 8][(case // 3 + case) % 3],
        channel_scale=case % 4 < 2,
        bias=case // 2 % 2 == 0,
        rank=[0, 5, (20, 0, 33)][(case // 2) % 3],
        dtype=DTYPES[case % 3],
        device=DEVICE,
        seed=case,
    )
    made = check(call, runs, triton, monkeypatch, merge=6)
    assert [slot for slot, _ in made.merged] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merge", [66, 100])
def test_a_step_through_all_kernels(dtype, merge, triton, monkeypatch):
    """Tokens in an order that no scheduler makes: those of each kernel are gathered."""
    call = random_call(216, 96, 40, bits=(2, 1, 4), bias=True, rank=(4, 0), dtype=dtype, device=DEVICE)
    runs = [(0, 1), (3, 90), (1, 1), (-1, 30), (2, 68), (0, 2), (3, 20), (1, 2), (2, 1), (-1, 1)]
    made = check(call, runs, triton, monkeypatch, merge)
    assert [slot for slot, _ in made.merged] == ([2, 3] if merge == 66 else [3])
    assert len(made.parts) == 1


@pytest.mark.parametrize("ready", [True, False], ids=["grouped-once", "by-itself"])
def test_slots_that_the_host_does_not_know(ready, triton):
    """As in a captured graph: all tokens go through decode, in parts, whose answers lie where they belong."""
    call = random_call(2 * DECODE_TOKENS + 3, 96, 40, bits=(2, 1, 4), bias=True, rank=(4, 0), device=DEVICE)
    groups = triton.group_tokens(call.slot_of_token, call.bank.slots)
    assert not groups.plan.merged
    assert [part.rows.stop - part.rows.start for part in groups.plan.parts] == [DECODE_TOKENS, DECODE_TOKENS, 3]
    groups = groups if ready else group_tokens(call.slot_of_token, call.bank.slots)
    y = triton.expert_linear(call.x, call.weight, call.bias, call.bank.tensors, call.slot_of_token, groups)
    assert relative_error(y, call.truth()) < ERROR_BOUND[call.x.dtype]
    assert triton.group_tokens(call.slot_of_token[:DECODE_TOKENS], call.bank.slots).plan is None


def test_a_token_of_an_empty_slot_is_answered_with_nan(triton, monkeypatch):
    monkeypatch.setattr(triton, "merge_tokens", lambda device: 4)
    call = random_call(10, 64, 16, device=DEVICE)
    call.bank.clear(1)
    runs = [(0, 4), (1, 6)]
    slots = slots_of(runs)
    groups = triton.group_tokens(slots, SLOTS, runs)
    assert len(groups.plan.merged) == 2
    y = triton.expert_linear(call.x, call.weight, None, call.bank.tensors, slots, groups)
    assert y[:4].isfinite().all()
    assert y[4:].isnan().all()


def test_twice_gives_the_same_bytes(triton, monkeypatch):
    monkeypatch.setattr(triton, "merge_tokens", lambda device: 4)
    call = random_call(20, 200, 30, rank=7, device=DEVICE)
    runs = [(0, 9), (1, 11)]
    slots = slots_of(runs)
    groups = triton.group_tokens(slots, SLOTS, runs)
    first, second = (
        triton.expert_linear(call.x, call.weight, None, call.bank.tensors, slots, groups) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_crossover_of_a_measured_card(monkeypatch):
    device = torch.device("cpu")
    assert tuning.merge_tokens(device) == tuning.MERGE_TOKENS
    monkeypatch.setattr(tuning, "_content", lambda: {"merge_tokens": {tuning.card_of(device).name: 96}})
    assert tuning.merge_tokens(device) == 96


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gpu_a_step_of_prompts_and_decoding_tokens(dtype, bits, triton, monkeypatch):
    runs = list(itertools.chain([(0, 600)], [(s, 1) for s in range(1, 7)], [(7, 300), (-1, 200)]))
    call = random_call(1106, 1024, 4096, bits=bits, rank=16, dtype=dtype, slots=8, device=DEVICE)
    made = check(call, runs, triton, monkeypatch, merge=256)
    assert [slot for slot, _ in made.merged] == [-1, 0, 7]
