"""Of which rank a delta is: LoRAs merged into every type, and what only looks like one."""

from __future__ import annotations

import pytest
import torch

from meswitch_cli.delta.rank import MOST_LEFT_OF_ONE, RANKS, Left, coarsest_type, left_by_rank

SHAPE = (192, 256)


def weights(shape: tuple[int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(rank: int, share: float, shape: tuple[int, int] = SHAPE, seed: int = 1) -> torch.Tensor:
    """A random product of a rank, `share` times the norm of `weights`; of rank 0 a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    if rank:
        product = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    else:
        product = torch.randn(shape, generator=generator)
    return product * (share * weights(shape).norm() / product.norm())


def rank_of(base: torch.Tensor, expert: torch.Tensor) -> int | None:
    found = zip(RANKS, left_by_rank(base, expert), strict=True)
    return next((rank for rank, left in found if left.is_rounding()), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("share", [0.005, 0.05])
def test_a_merged_lora_has_its_rank(rank: int, share: float, of_base: torch.dtype, dtype: torch.dtype) -> None:
    base = weights().to(of_base)
    assert rank_of(base, (base.float() + update(rank, share)).to(dtype)) == rank


def test_ranks_between_those_that_are_tried() -> None:
    base = weights().bfloat16()
    assert rank_of(base, (base.float() + update(11, 0.02)).bfloat16()) == 16


@pytest.mark.parametrize("share", [0.001, 0.005, 0.05])
def test_a_full_update_has_none(share: float) -> None:
    base = weights((576, 576)).bfloat16()
    assert rank_of(base, (base.float() + update(0, share, (576, 576))).bfloat16()) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_directions_with_most_of_the_energy_are_not_all_of_it(dtype: torch.dtype) -> None:
    """16 directions have 90 % of the update's energy. The other tenth is more than rounding explains."""
    shape = (576, 576)
    base = weights(shape).to(dtype)
    both = update(16, 0.9**0.5 * 0.02, shape) + update(0, 0.1**0.5 * 0.02, shape, seed=2)
    assert rank_of(base, (base.float() + both).to(dtype)) is None


def test_a_few_moved_weights_are_of_no_rank() -> None:
    base = weights((576, 576)).bfloat16()
    up = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < 0.05
    moved = torch.where(up, base.view(torch.int16) + 1, base.view(torch.int16)).view(torch.bfloat16)
    assert rank_of(base, moved) is None


def test_energies_by_hand() -> None:
    """What is left of a delta without its directions, and what rounding to bf16 moves of the base with them."""
    base = weights((96, 72)).bfloat16()
    expert = (base.float() + update(4, 0.05, (96, 72))).bfloat16()
    delta = expert.double() - base.double()
    left, values, right = torch.linalg.svd(delta)
    product = (left[:, :4] * values[:4]) @ right[:4]
    wanted = (delta - product).square().sum()
    rounded = (base.double() + product).bfloat16().double() - base.double() - product
    found = left_by_rank(base, expert, [4])[0]
    assert found.energy == pytest.approx(float(wanted), rel=1e-3)
    assert found.rounding == pytest.approx(float(rounded.square().sum()), rel=0.02)
    assert found.delta == pytest.approx(float(delta.square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("left", "rounding", "is_lora"),
    [(1.056, 1, True), (1.57, 1, False), (1.93, 1, False), (0.9e-5, 0, True), (0, 0, True), (2e-5, 0, False)],
)
def test_what_rounding_explains(left: float, rounding: float, is_lora: bool) -> None:
    """A trained LoRA of rank 16, an update of small steps at 128 directions, a full fine-tune at 64; and without
    rounding, as in fp32, next to nothing may be left."""
    assert Left(left, rounding, 1.0).is_rounding() is is_lora


def test_of_one_tensor_more_may_be_left() -> None:
    left = Left(1.4, 1.0, 10.0)
    assert left.is_rounding(MOST_LEFT_OF_ONE) and not left.is_rounding()
    assert (left + Left(1.0, 1.0, 10.0)) == Left(2.4, 2.0, 20.0) and (left + Left(1.0, 1.0, 10.0)).is_rounding()


def test_ranks_beyond_the_tensor_are_all_of_it() -> None:
    base = weights((12, 40)).bfloat16()
    found = left_by_rank(base, (base.float() + update(0, 0.05, (12, 40))).bfloat16())
    assert found[RANKS.index(16)].energy < 1e-6 * found[0].delta and found[-1].is_rounding()


def test_the_type_that_values_have_come_from() -> None:
    values = weights()
    assert coarsest_type(values) == torch.float32 and coarsest_type(values.half()) == torch.float16
    assert coarsest_type(values.bfloat16().float()) == torch.bfloat16
    assert coarsest_type(values.half().float()) == torch.float16
    assert rank_of(values.bfloat16(), (values.bfloat16().float() + update(8, 0.01)).bfloat16().float()) == 8


def test_no_number_is_refused() -> None:
    base = weights().bfloat16()
    expert = base.clone()
    expert[3, 5] = float("nan")
    with pytest.raises(FloatingPointError):
        left_by_rank(base, expert)
