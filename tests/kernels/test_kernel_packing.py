import pytest
import torch

from meswitch_kernels.packing import from_planes, pack_codes, to_planes, unpack_codes, words_per_row


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 129])
def test_unpack_inverts_pack(bits, width):
    codes = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(width))
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, words_per_row(width, bits))
    assert torch.equal(unpack_codes(words, bits, width).long(), codes)


def test_codes_are_little_endian_along_the_input():
    codes = torch.tensor([[1, 2, 3] + [0] * 13 + [2]])
    assert pack_codes(codes, 2).tolist() == [[0b111001, 2]]


def test_the_last_code_of_a_word_may_set_its_sign_bit():
    codes = torch.zeros(1, 16, dtype=torch.long)
    codes[0, 15] = 3
    assert pack_codes(codes, 2).tolist() == [[-(1 << 30)]]
    assert torch.equal(unpack_codes(pack_codes(codes, 2), 2, 16).long(), codes)


def test_padding_bits_are_zero():
    assert pack_codes(torch.full((1, 5), 15), 4).tolist() == [[0xFFFFF]]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 7, 33, 100, 256, 512, 1024, 1025, 2100])
def test_planes_hold_neighbouring_channels(bits, width):
    """Every code is found by the definition, and the way back gives the same words."""
    codes = torch.randint(0, 2**bits, (2, width), generator=torch.Generator().manual_seed(width))
    words = pack_codes(codes, bits)
    planes = to_planes(words, bits)
    assert torch.equal(from_planes(planes, bits), words)
    channels = 32 * 32 // bits
    for i in range(width):
        block, place = divmod(i, channels)
        together = min(32, words.shape[1] - 32 * block)
        plane, pair = divmod(place, 2 * together)
        word = planes[:, 32 * block + pair // 2]
        assert torch.equal(word >> (plane * bits + pair % 2 * 16) & 2**bits - 1, codes[:, i].int())


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 33, 512, 1025, 2100])
@pytest.mark.parametrize("out_features", [1, 21])
def test_planes_in_one_launch(needs_triton, bits, width, out_features):
    from meswitch_kernels import triton_planes

    codes = torch.randint(0, 2**bits, (out_features, width), generator=torch.Generator().manual_seed(width))
    words = pack_codes(codes, bits).to("cuda" if torch.cuda.is_available() else "cpu")
    memory = torch.full((words.numel() + 2,), -1, dtype=torch.int32, device=words.device)
    triton_planes.to_planes(words, bits, memory[1:-1].view(words.shape))
    assert torch.equal(memory[1:-1].view(words.shape), to_planes(words, bits))
    assert memory[0] == memory[-1] == -1


@pytest.mark.parametrize("bits", [0, 3, 8])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        pack_codes(torch.zeros(1, 4, dtype=torch.long), bits)
