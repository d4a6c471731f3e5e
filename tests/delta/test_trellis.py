"""Trellis codes: the decoder against its definition, the search against itself and against what it must find."""

import importlib.util

import pytest
import torch

from meswitch_cli.delta import viterbi
from meswitch_cli.delta.codes import CODES, TRELLIS_CODES, TrellisCode, pack, unpack
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.delta.trellis import branches, decode
from meswitch_cli.delta.trellis_encoder import SEAM, encode, whole_numbers

#: Besides the codes in use: more states, fewer, and four levels at half a bit.
ALL = [
    *TRELLIS_CODES.values(),
    TrellisCode(0.25, (0x197, 0x1D1, 0x1AB, 0x19F), 256),
    TrellisCode(0.5, (0x15, 0x1F, 0x13, 0x1B), 16),
]
NAMES = [f"{code.bits} bit, {code.width} wide, {code.states} states" for code in ALL]
every_code = pytest.mark.parametrize("code", ALL, ids=NAMES)


def _gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _channels(columns: int, *without: int) -> torch.Tensor:
    return torch.ones(columns).index_fill(0, torch.tensor(without, dtype=torch.long), 0.0) > 0


def _bits(words: torch.Tensor) -> list[list[int]]:
    return [[word >> place & 1 for word in row for place in range(32)] for row in words.tolist()]


def _by_definition(messages: torch.Tensor, code: TrellisCode, columns: int) -> torch.Tensor:
    """Codes `[rows, columns]`, channel by channel."""
    rows = []
    for message in _bits(messages):
        codes = []
        for channel in range(columns):
            word, rest = divmod(channel, 32 * code.channels_a_bit)
            share, place = divmod(rest, 32)
            step = 32 * word + place
            found = 0
            for plane in range(code.width):
                mask = code.taps[code.width * share + plane]
                seen = [message[(step - back) % len(message)] for back in range(code.memory + 1) if mask >> back & 1]
                found |= (sum(seen) % 2) << plane
            codes.append(found)
        rows.append(codes)
    return torch.tensor(rows, dtype=torch.uint8)


@every_code
@pytest.mark.parametrize("columns", [1, 32, 70, 96, 256, 577])
def test_decoding_is_what_the_definition_says(code: TrellisCode, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (3, code.words(columns))
    messages = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    packed = decode(messages, code, columns)
    assert torch.equal(packed, pack(_by_definition(messages, code, columns), code.width))


@every_code
def test_a_word_decodes_by_itself_given_the_one_before(code: TrellisCode) -> None:
    """As a rank of tensor parallelism must, that owns a range of words."""
    columns = 4 * 32 * code.channels_a_bit
    messages = encode(_gaussian(2, columns), code, _channels(columns))
    words = messages.shape[1] // 4
    part = decode(messages[:, words - 1 : 3 * words], code, columns)
    span = 32 * code.channels_a_bit * code.width // 32
    assert torch.equal(part[:, span : span * (1 + 2 * words)], decode(messages, code, columns)[:, span : 3 * span])


WILD = {
    "gaussian": lambda x: x,
    "heavy tails": lambda x: x.pow(7),
    "mostly zero": lambda x: x * (x.abs() > 1.5),
    "all zero": lambda x: x * 0,
    "one weight": lambda x: x * 1e-6 + 1e4 * (torch.arange(x.numel()).view(x.shape) == 5),
    "tiny": lambda x: x * 1e-38,
    "huge": lambda x: x * 1e30,
    "equal": lambda x: x.sign(),
}


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the fast search needs numba")
@every_code
@pytest.mark.parametrize("kind", WILD)
@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (33, 300)])
def test_both_searches_find_the_same_messages(code: TrellisCode, kind: str, rows: int, columns: int) -> None:
    from meswitch_cli.delta import viterbi_cpu

    block, channels = WILD[kind](_gaussian(rows, columns)), _channels(columns, 0, 17)
    found = branches(code)
    values, costs = whole_numbers(block, code, channels, found)
    slow, fast = (way.best_messages(values, costs, code, found, SEAM) for way in (viterbi, viterbi_cpu))
    assert torch.equal(slow, fast)
    assert torch.equal(fast, encode(block, code, channels))


def test_without_numba_the_slow_search_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code, block = TRELLIS_CODES[0.25], _gaussian(3, 200)
    expected = encode(block, code, _channels(200))
    used = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = viterbi.best_messages
    monkeypatch.setattr(viterbi, "best_messages", lambda *given: used.append(1) or plain(*given))
    assert torch.equal(encode(block, code, _channels(200)), expected) and used


def _won(messages: torch.Tensor, values: torch.Tensor, costs: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """What messages win, `[rows]`: the search's own measure, from the decoded codes."""
    columns = values.shape[1]
    levels = 2 * unpack(decode(messages, code, columns), code.width, columns).long() - (1 << code.width) + 1
    return (levels * values - costs * (levels.abs() > 1)).sum(1)


@every_code
def test_no_change_of_a_bit_or_two_wins_more(code: TrellisCode) -> None:
    block = _gaussian(2, 60 * code.channels_a_bit)
    found = branches(code)
    values, costs = (item.long() for item in whole_numbers(block, code, _channels(block.shape[1]), found))
    messages = encode(block, code, _channels(block.shape[1]))
    best = _won(messages, values, costs, code)
    steps = 32 * messages.shape[1] - code.memory  # the last bits are the state that was decided on before
    for first in range(steps):
        for second in (None, *range(first + 1, min(first + 4, steps))):
            changed = messages.clone()
            for place in (first, second):
                if place is not None:
                    changed[:, place // 32] ^= torch.tensor(1 << place % 32).to(torch.int32)
            assert (_won(changed, values, costs, code) <= best).all()


@every_code
def test_metrics_stay_within_sixteen_bits(code: TrellisCode) -> None:
    found = branches(code)
    span = {1: 2, 2: 6}[code.width] * code.channels_a_bit * found.largest
    assert found.handicap >= code.memory * span
    assert found.handicap + (code.memory + 1) * span < 1 << 15
    values, costs = whole_numbers(_gaussian(8, 256).pow(9), code, _channels(256, 3), found)
    assert values.abs().max() == found.largest and (values[:, 3] == 0).all() and costs[3] == 0


#: Noise of the unbiased code over a Gaussian's energy, and the least that any code of this rate can have.
NOISE = {0.125: (6.1, 5.285), 0.25: (2.77, 2.414), 0.5: (1.16, 1.0), 1: (0.41, 0.3333)}


@pytest.mark.parametrize("bits", TRELLIS_CODES)
def test_noise_of_a_gaussian_delta(bits: float) -> None:
    delta = _gaussian(128, 2048)
    found, error = quantize(torch.zeros_like(delta), delta, QuantizerSettings(bits, 0, code="trellis"))
    assert NOISE[bits][1] < error.weight_error < NOISE[bits][0]
    torch.testing.assert_close((dequantize(found) * delta).sum(1), delta.square().sum(1), rtol=1e-4, atol=0)
    assert found.codes.numel() * 32 == bits * delta.numel()


def test_four_levels_at_a_bit_halve_the_noise_of_signs() -> None:
    delta = _gaussian(64, 1024).sign() * _gaussian(64, 1024, 1).square()  # heavier tails than a Laplacian
    errors = [
        quantize(torch.zeros_like(delta), delta, QuantizerSettings(1, 0, code=code))[1].weight_error
        for code in ("trellis", "scalar")
    ]
    assert errors[0] < errors[1] * 0.7


@every_code
def test_channels_that_do_not_count_cost_nothing(code: TrellisCode) -> None:
    channels = _channels(300, *range(50, 90))
    block = _gaussian(5, 300)
    wild = torch.where(channels, block, 1e3)
    assert torch.equal(encode(block, code, channels), encode(wild, code, channels))


def _pair(rows: int = 96, columns: int = 288) -> tuple[torch.Tensor, torch.Tensor]:
    base = _gaussian(rows, columns, 4)
    delta = _gaussian(rows, columns, 5) * 1e-2
    delta[:, [120, 199]] *= 9
    delta += _gaussian(rows, 2, 6) @ _gaussian(2, columns, 7) * 1e-2
    return base, base + delta


def _statistics(columns: int = 288) -> InputStatistics:
    inputs = _gaussian(32, columns, 8) * torch.linspace(0.2, 4, columns)
    return InputStatistics(inputs.square().sum(0), None, 32, inputs)


@pytest.mark.parametrize("bits", TRELLIS_CODES)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scale", ["none", "rms"])
@pytest.mark.parametrize("steps", ["unbiased", "output-unbiased", "least-squares"])
def test_reported_error_is_the_error_of_what_is_stored(bits: float, rank: int, scale: str, steps: str) -> None:
    base, expert = _pair()
    settings = QuantizerSettings(bits, 4, 0, scale, "nearest", steps, rank, "trellis")  # type: ignore[arg-type]
    found, error = quantize(base, expert, settings, _statistics())
    delta = expert - base
    missed = (delta - dequantize(found)).square()
    assert error.weight_error == pytest.approx(float(missed.sum() / delta.square().sum()), rel=2e-3)
    index = found.salient_channels
    assert len(index) == 4 and {120, 199} <= set(index.tolist())
    torch.testing.assert_close(
        dequantize(found)[:, index], delta[:, index], rtol=0, atol=float(delta.abs().max()) * 2**-9
    )


def test_output_unbiased_steps_keep_the_outputs_projection() -> None:
    base, expert = _pair()
    statistics, delta = _statistics(), expert - base
    settings = QuantizerSettings(0.25, 0, steps="output-unbiased")
    found, _ = quantize(base, expert, settings, statistics)
    outputs, kept = (item @ statistics.inputs.T for item in (delta, dequantize(found)))
    torch.testing.assert_close((outputs * kept).sum(), outputs.square().sum(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", TRELLIS_CODES)
def test_bytes_do_not_depend_on_threads_or_blocks(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert = _pair(rows=200)
    settings = QuantizerSettings(bits, 4, rank=4, steps="output-unbiased", code="trellis")
    results = []
    for threads, elements in ((1, 1 << 18), (2, 1 << 18), (1, 288 * 64), (2, 288 * 32)):
        monkeypatch.setattr("meswitch_cli.delta.rounding.BLOCK_ELEMENTS", elements)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(quantize(base, expert, settings, _statistics())[0].tensors)
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())
    assert all(torch.equal(found["codes"], results[0]["codes"]) for found in results)


@pytest.mark.parametrize("bits", TRELLIS_CODES)
def test_scalar_is_the_same_delta(bits: float) -> None:
    base, expert = _pair()
    found, _ = quantize(base, expert, QuantizerSettings(bits, 3, channel_scale="rms", rank=2, code="trellis"))
    scalar = found.scalar()
    assert scalar.trellis is None and scalar.bits == TRELLIS_CODES[bits].width in CODES
    assert scalar.codes.shape == (96, 288 * scalar.bits // 32) and found.codes.shape == (96, -(-288 * bits // 32))
    assert torch.equal(dequantize(scalar), dequantize(found))
    assert scalar.scalar() is scalar
    assert all(scalar.tensors[name] is tensor for name, tensor in found.tensors.items() if name != "codes")


@pytest.mark.parametrize("shape", [(1, 32), (5, 33), (7, 1), (40, 100)])
@pytest.mark.parametrize("bits", TRELLIS_CODES)
def test_odd_shapes(bits: float, shape: tuple[int, int]) -> None:
    delta = _gaussian(*shape)
    found, error = quantize(torch.zeros(shape), delta, QuantizerSettings(bits, 0, code="trellis"))
    assert dequantize(found).shape == shape and error.weight_error < 1.5 * NOISE[bits][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 0.25, "group_size": 128}, "group size must be 0 for trellis codes"),
        ({"bits": 0.25, "rounding": "feedback"}, "rounding must be nearest"),
        ({"bits": 0.25, "code": "scalar"}, "scalar codes: bits must be 1, 2 or 4, not 0.25"),
        ({"bits": 2, "code": "trellis"}, "trellis codes: bits must be 0.125, 0.25, 0.5 or 1, not 2"),
        ({"bits": 0.3}, "bits must be 0.125, 0.25, 0.5, 1, 2 or 4, not 0.3"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerSettings(**values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    base, expert = _pair()
    expert[2, 3] = bad
    with pytest.raises(FloatingPointError):
        quantize(base, expert, QuantizerSettings(0.25, 2))
