# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""The search for a row's best message on a CPU: 32 rows at a time, one in each 16-bit lane of a vector.

Viterbi: of every state's two predecessors the one whose path has won more survives, and which one it was is a bit.
Path metrics wrap: only the signs of differences are looked at, which `trellis.branches` keeps within 15 bits. A row is
a circle, so its beginning waits for its end: a short search across the seam decides the state in which it begins, and
the search along the row begins and ends in that.

Numba emits the vectors, so no compiler is needed.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from meswitch_cli.delta.codes import WORD_BITS, TrellisCode
from meswitch_cli.delta.trellis import ROWS_TOGETHER, Branches, branches

LANES = ROWS_TOGETHER
#: States that a word of decisions tells of.
DECISIONS = 16
_ROW = 2 * LANES
_I16, _I64, _VECTOR = ir.IntType(16), ir.IntType(64), ir.VectorType(ir.IntType(16), LANES)


def best_messages(
    values: torch.Tensor, costs: torch.Tensor, code: TrellisCode, found: Branches, seam: int
) -> torch.Tensor:
    """As `viterbi.best_messages`."""
    messages = torch.zeros(len(values), values.shape[1] // (WORD_BITS * code.channels_a_bit), dtype=torch.int32)
    _search(
        values.contiguous().numpy(),
        costs.numpy(),
        code.width,
        code.channels_a_bit,
        _offsets(code),
        found.handicap,
        seam,
        messages.numpy(),
    )
    return messages


@functools.lru_cache(16)
def _offsets(code: TrellisCode) -> Any:
    """Bytes from the table of labels to each branch's, int64 `[states / 2, 2, 2]`."""
    return (branches(code).labels * _ROW).contiguous().numpy()


def _vector(builder: ir.IRBuilder, address: Any, offset: int = 0) -> Any:
    place = builder.inttoptr(builder.add(address, _I64(offset)), _VECTOR.as_pointer())
    return place


def _load(builder: ir.IRBuilder, address: Any, offset: int = 0) -> Any:
    return builder.load(_vector(builder, address, offset), align=2)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


@intrinsic
def _survive(typingctx, low, high, new, labels, offsets, decisions):
    """Sixteen new states from eight predecessors at `low` and eight at `high`, whose vectors lie one after another."""

    def codegen(_context, builder, _signature, args):
        low, high, new, labels, offsets, decisions = args
        word = _splat(0)
        for state in range(DECISIONS):
            own, candidates = state // 2, []
            for part, metrics in enumerate((low, high)):
                where = builder.add(offsets, _I64(8 * (2 * state + part)))
                offset = builder.load(builder.inttoptr(where, _I64.as_pointer()))
                won = _load(builder, builder.add(labels, offset))
                candidates.append(builder.add(_load(builder, metrics, own * _ROW), won))
            difference = builder.sub(*candidates)
            second = builder.icmp_signed("<", difference, _splat(0))
            builder.store(builder.select(second, candidates[1], candidates[0]), _vector(builder, new, state * _ROW), 2)
            place = 1 << state
            bit = _splat(place - (1 << 16) if place >> 15 else place)
            word = builder.or_(word, builder.select(second, bit, _splat(0)))
        builder.store(word, _vector(builder, decisions), 2)

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def _add_level(typingctx, target, table, value, level, cost):
    """target = table + level * value - cost, a vector each but for the two numbers."""

    def codegen(_context, builder, _signature, args):
        target, table, value, level, cost = args
        level, cost = (_broadcast(builder, builder.trunc(number, _I16)) for number in (level, cost))
        won = builder.sub(builder.mul(_load(builder, value), level), cost)
        builder.store(builder.add(_load(builder, table), won), _vector(builder, target), 2)

    return types.void(*[types.int64] * 5), codegen


def _broadcast(builder: ir.IRBuilder, scalar: Any) -> Any:
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.IntType(32)(0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(_VECTOR, ir.Undefined), order)


@njit(nogil=True)
def _gather(values, first, width, channels, lanes):
    """The values of rows `first` and up, `[steps, channels, lanes]`; lanes beyond the last row keep what they have."""
    words = values.shape[1] // (WORD_BITS * channels)
    for lane in range(min(LANES, len(values) - first)):
        row = values[first + lane]
        for word in range(words):
            for channel in range(channels):
                place = WORD_BITS * (word * channels + channel)
                for bit in range(WORD_BITS):
                    lanes[word * WORD_BITS + bit, channel, lane] = row[place + bit]


@njit(nogil=True)
def _step(values, costs, width, metrics, new, table, offsets, decisions):
    """One step of all lanes: metrics `[states, lanes]` to new ones, and the decisions."""
    count, levels, labels = 1, 1 << width, table.ctypes.data
    for channel in range(len(values)):
        value = values.ctypes.data + channel * _ROW
        for level in range(levels - 1, -1, -1):  # downwards: level 0 overwrites what the others are made of
            times = 2 * level - levels + 1
            cost = costs[channel] if times * times > 1 else 0
            for label in range(count):
                _add_level(labels + (level * count + label) * _ROW, labels + label * _ROW, value, times, cost)
        count *= levels
    half = len(metrics) // 2
    for part in range(len(metrics) // DECISIONS):
        first = part * (DECISIONS // 2)
        _survive(
            metrics.ctypes.data + first * _ROW,
            metrics.ctypes.data + (half + first) * _ROW,
            new.ctypes.data + part * DECISIONS * _ROW,
            labels,
            offsets.ctypes.data + part * DECISIONS * 16,
            decisions.ctypes.data + part * _ROW,
        )


@njit(nogil=True)
def _before(state, decisions, lane, half):
    """The state that survived into `state`."""
    bit = decisions[state // DECISIONS, lane] >> (state % DECISIONS) & 1
    return (state >> 1) | (half if bit else 0)


@njit(nogil=True)
def _first_best(metrics, lane):
    """The state with the largest metric, the first of several."""
    found = 0
    for state in range(1, len(metrics)):
        if numpy.int16(metrics[state, lane] - metrics[found, lane]) > 0:
            found = state
    return found


@njit(nogil=True, cache=True)
def _search(values, costs, width, channels, offsets, handicap, seam, messages):
    """Fill in the messages of all rows; `values` int16 `[rows, channels]` and `costs` `[channels]` are in row order."""
    steps, half = values.shape[1] // channels, len(offsets)
    states = 2 * half
    lanes = numpy.zeros((steps, channels, LANES), numpy.int16)
    costs = costs.reshape(-1, channels, WORD_BITS).transpose(0, 2, 1).copy().reshape(steps, channels)
    table = numpy.empty((1 << (width * channels), LANES), numpy.int16)
    metrics = numpy.empty((states, LANES), numpy.int16)
    new = numpy.empty((states, LANES), numpy.int16)
    decisions = numpy.empty((max(steps, 2 * seam), states // DECISIONS, LANES), numpy.int16)
    start = numpy.empty(LANES, numpy.int64)
    for first in range(0, len(values), LANES):
        _gather(values, first, width, channels, lanes)
        metrics[:] = 0
        for index in range(2 * seam):
            step = (steps - seam + index) % steps
            table[0] = 0
            _step(lanes[step], costs[step], width, metrics, new, table, offsets, decisions[index])
            metrics, new = new, metrics
        for lane in range(LANES):
            state = _first_best(metrics, lane)
            for index in range(2 * seam - 1, seam - 1, -1):
                state = _before(state, decisions[index], lane, half)
            start[lane] = state
        metrics[:] = -handicap
        for lane in range(LANES):
            metrics[start[lane], lane] = 0
        for step in range(steps):
            table[0] = 0
            _step(lanes[step], costs[step], width, metrics, new, table, offsets, decisions[step])
            metrics, new = new, metrics
        for lane in range(min(LANES, len(values) - first)):
            state = start[lane]
            for step in range(steps - 1, -1, -1):
                messages[first + lane, step // WORD_BITS] |= numpy.int32((state & 1) << (step % WORD_BITS))
                state = _before(state, decisions[step], lane, half)
