"""The code of what two tensors differ in: every bit comes back, and what is damaged is refused."""

import random

import pytest
import torch

from meswitch_cli.delta import exact

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {2: torch.int16, 4: torch.int32}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def pair(
    dtype: torch.dtype, shape: tuple[int, ...], share: float, seed: int = 0, size: float = 1.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor, and one of whose elements a share is `size` times as large."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    moved = torch.rand(shape, generator=generator) < share
    return base, torch.where(moved, (size * base.float()).to(dtype), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7, 33), (300, 128), (3, 4, 5)], ids=str)
def test_every_bit_comes_back(dtype: torch.dtype, share: float, shape: tuple[int, ...]) -> None:
    base, expert = pair(dtype, shape, share)
    stream = exact.encode(base, expert)
    exact.check(stream, base.numel())
    found = exact.decode(stream, base)
    assert found.dtype == dtype
    assert found.shape == base.shape
    assert torch.equal(bits_of(found), bits_of(expert))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_numbers(dtype: torch.dtype) -> None:
    """Zeros of either sign, subnormal and the largest numbers: steps as long as the type allows."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.smallest_normal / 4, 1.0, -1.0, 1 + info.eps]
    both = torch.tensor([(a, b) for a in values for b in values], dtype=torch.float64).to(dtype)
    base, expert = both[:, 0].contiguous(), both[:, 1].contiguous()
    found = exact.decode(exact.encode(base, expert), base)
    assert torch.equal(bits_of(found), bits_of(expert))


def test_a_base_of_another_type() -> None:
    base, expert = pair(torch.float32, (50, 40), 0.1)
    rounded = expert.to(torch.bfloat16)
    found = exact.decode(exact.encode(base, rounded), base)
    assert torch.equal(bits_of(found), bits_of(rounded))
    wide = exact.decode(exact.encode(base.to(torch.bfloat16), expert), base.to(torch.bfloat16))
    assert torch.equal(bits_of(wide), bits_of(expert))


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks without a change, and a last one that is shorter."""
    monkeypatch.setattr(exact, "BLOCK", 1000)
    base, expert = pair(torch.bfloat16, (4321,), 0.1)
    expert[1000:3000] = base[1000:3000]
    stream = exact.encode(base, expert)
    exact.check(stream, 4321)
    assert torch.equal(bits_of(exact.decode(stream, base)), bits_of(expert))


def test_the_same_bytes_each_time_and_not_a_transposed_views() -> None:
    base, expert = pair(torch.bfloat16, (64, 96), 0.1)
    assert torch.equal(exact.encode(base, expert), exact.encode(base.clone(), expert.clone()))
    found = exact.decode(exact.encode(base.T, expert.T), base.T)
    assert torch.equal(bits_of(found), bits_of(expert.T))


@pytest.mark.parametrize(("share", "most"), [(0.01, 0.1), (0.05, 0.345), (0.3, 1.22)])
def test_size_is_near_the_entropy(share: float, most: float) -> None:
    """Bits a weight where every change is as likely: places of H(p), one bit for the sign, and the coder's loss."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(512, 1024, generator=generator).to(torch.bfloat16)
    moved = torch.rand(base.shape, generator=generator) < share
    sign = torch.randint(0, 2, base.shape, generator=generator, dtype=torch.int16) * 2 - 1
    expert = torch.where(moved, bits_of(base) + sign, bits_of(base)).view(torch.bfloat16)
    assert 8 * len(exact.encode(base, expert)) / base.numel() < most


def test_what_differs_in_shape_or_is_no_such_type_is_refused() -> None:
    base, expert = pair(torch.bfloat16, (8, 8), 0.1)
    for other in (expert[:4], expert.double()):
        with pytest.raises(ValueError, match="against"):
            exact.encode(base, other)


def test_damage_is_refused_or_harmless() -> None:
    """Whatever a stream says, reading it ends in ValueError or in a tensor of the right size."""
    base, expert = pair(torch.bfloat16, (40, 50), 0.2, size=30.0)
    stream = exact.encode(base, expert)
    rng, refused = random.Random(0), 0
    for _ in range(300):
        damaged = stream.clone()
        damaged[rng.randrange(len(stream))] = rng.randrange(256)
        try:
            exact.check(damaged, base.numel())
            assert exact.decode(damaged, base).shape == base.shape
        except ValueError:
            refused += 1
    assert refused > 200
    for length in (0, 10, len(stream) - 1):
        with pytest.raises(ValueError, match=r"short|says|unpack|fewer"):
            exact.check(stream[:length], base.numel())
    with pytest.raises(ValueError, match="longer"):
        exact.check(torch.cat([stream, stream[:1]]), base.numel())
    for numel in (100, base.numel() // 2):
        with pytest.raises(ValueError, match=r"beyond|more|says|fewer"):
            exact.check(stream, numel)
