import pytest
import torch

from meswitch_cli.delta.codes import pack, packed_width, unpack


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 96, 100])
def test_unpack_inverts_pack(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_code_i_lies_where_the_format_says(bits: int) -> None:
    columns = 70
    for channel in (0, 1, 31, 32, 69):
        codes = torch.zeros(1, columns, dtype=torch.uint8)
        codes[0, channel] = (1 << bits) - 1
        words = [word % 2**32 for word in pack(codes, bits)[0].tolist()]
        expected = [0] * packed_width(columns, bits)
        expected[channel * bits // 32] = ((1 << bits) - 1) << (channel * bits % 32)
        assert words == expected
