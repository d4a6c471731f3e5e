import pytest
import torch

from meswitch_kernels import group_tokens
from meswitch_kernels.groups import max_tiles, sort_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(groups, slots):
    """Every token is in exactly one tile, and that tile has its slot."""
    seen = []
    for slot, start, count in zip(groups.tile_slot, groups.tile_start, groups.tile_count, strict=True):
        assert 0 <= count <= groups.tile_size
        tokens = groups.order[start : start + count]
        assert (slots[tokens] == slot).all()
        seen += tokens.tolist()
    assert sorted(seen) == list(range(len(slots)))


@pytest.mark.parametrize("slots", [1, 2, 6])
@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17, 60])
@pytest.mark.parametrize("skew", [1, 4])
def test_tiles_cover_every_token_once(slots, tile, tokens, skew):
    rng = torch.Generator().manual_seed(tokens * 7 + slots)
    tensor = (torch.rand(tokens, generator=rng) ** skew * (slots + 1)).to(torch.int32) - 1
    groups = group_tokens(tensor, slots, tile)
    check(groups, tensor)
    assert len(groups.tile_slot) == (max_tiles(len(tensor), slots, tile) if tokens else 0)
    for field in ("order", "tile_slot", "tile_start", "tile_count"):
        assert getattr(groups, field).dtype == torch.int32


def test_shapes_follow_from_tokens_and_slots_alone():
    alike = group_tokens(torch.zeros(50, dtype=torch.int32), 8)
    spread = group_tokens(torch.arange(50, dtype=torch.int32) % 8, 8)
    assert [alike.order.shape, alike.tile_slot.shape] == [spread.order.shape, spread.tile_slot.shape]
    assert alike.tile_size == spread.tile_size


def test_tokens_of_one_slot_keep_their_order():
    groups = group_tokens(torch.tensor([1, 0, 1, -1, 0], dtype=torch.int32), 2)
    assert groups.order.tolist() == [3, 1, 4, 0, 2]


def test_a_slot_without_tokens_takes_no_tile():
    slots = torch.tensor([2, -1, 0, 2, 2, -1, 0, 2], dtype=torch.int32)
    groups = group_tokens(slots, 3, tile_size=2)
    check(groups, slots)
    assert groups.tile_slot[groups.tile_count > 0].tolist() == [-1, 0, 2, 2]


@pytest.mark.parametrize("slots", [1, 5, 31, 300])
@pytest.mark.parametrize("tile", [8, 16, 64])
@pytest.mark.parametrize("tokens", [1, 16, 65, 200])
def test_one_launch_groups_as_pytorch_does(needs_triton, tokens, tile, slots):
    """Slots outside the bank among them: their tokens must be visited too."""
    from meswitch_kernels import triton_groups

    rng = torch.Generator().manual_seed(tokens + slots)
    for first, last in ((-1, slots), (-4, slots + 4), (slots - 1, slots), (-1, 0)):
        tensor = torch.randint(first, last, (tokens,), generator=rng, dtype=torch.int32).to(DEVICE)
        tiles = max_tiles(tokens, slots, tile)
        expected = sort_tokens(tensor, slots, tile, tiles)
        for found, wanted in zip(triton_groups.sort_tokens(tensor, slots, tile, tiles), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert found.tolist() == wanted.tolist()


def test_a_column_of_a_table_is_grouped(needs_triton):
    from meswitch_kernels import triton_groups

    table = torch.tensor([[1, 7], [-1, 7], [1, 7], [0, 7]], dtype=torch.int32, device=DEVICE)
    assert triton_groups.sort_tokens(table[:, 0], 2, 16, 3)[0].tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.tensor([0, 3], dtype=torch.int32), IndexError),
        (torch.tensor([-2], dtype=torch.int32), IndexError),
        (torch.tensor([0]), TypeError),
        (torch.zeros(1, 1, dtype=torch.int32), ValueError),
    ],
)
def test_bad_slots_are_refused(tensor, error):
    with pytest.raises(error):
        group_tokens(tensor, 3)
