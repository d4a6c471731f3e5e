# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""LLVM building blocks of the CPU kernels: 16 float lanes, on whatever vectors the machine has.

Everything here is emitted through Numba at run time, so no compiler is needed. A machine with AVX-512 BF16
multiplies bfloat16 pairs directly (`vdpbf16ps`) and turns codes into values by a register lookup (`vpermw`);
any other machine gets the same results from shifts and float32 multiply-adds, with AVX2 or AVX-512 and up to 2 or 4
bits from a register lookup (`vpermps`) too.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
V16F, V16I, V32H = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, 2 * LANES)

_FEATURES = dict(llvm.get_host_cpu_features())
if config.CPU_NAME:  # numba is told to compile for another processor (docs/kernels.md)
    _FEATURES = {"avx2": config.CPU_NAME in ("haswell", "x86-64-v3")}
HAS_BF16 = bool(_FEATURES.get("avx512bf16") and _FEATURES.get("avx512bw"))
TABLE_LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 0
"""Float32 values that one instruction looks up by lane, and lanes it does that for; 0 where there is none."""
ROWS = 4 if _FEATURES.get("avx512f") else 2
"""Weight rows a kernel works on at once: as many as the accumulators leave registers for."""

Emit = Callable[[ir.IRBuilder, Sequence[Any]], Any]


def emitted(arguments: int, emit: Emit, returns: Any = types.void) -> Any:
    """A Numba function of `arguments` int64 arguments whose body is what `emit` builds."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Sequence[Any]) -> Any:
        result = emit(builder, args)
        return None if returns is types.void else result

    names = ", ".join(f"a{i}" for i in range(arguments))
    scope: dict[str, Any] = {"signature": returns(*[types.int64] * arguments), "codegen": codegen}
    exec(f"def typer(context, {names}):\n    return signature, codegen", scope)
    return intrinsic(scope["typer"])


def chosen(arguments: int, variants: Mapping[int, Emit]) -> Any:
    """A Numba function of a number and `arguments` int64 arguments, which does what the variant of that number does."""

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        number, *rest = args
        end = builder.append_basic_block("chosen.end")
        switch = builder.switch(number, end)
        for value, variant in variants.items():
            block = builder.append_basic_block(f"chosen.{value}")
            switch.add_case(I64(value), block)
            builder.position_at_end(block)
            variant(builder, rest)
            builder.branch(end)
        builder.position_at_end(end)

    return emitted(arguments + 1, emit)


def splat(value: Any, element: ir.Type, lanes: int = LANES) -> ir.Constant:
    """A constant vector with `value` in every lane."""
    return constants([value] * lanes, element)


def constants(values: Sequence[Any], element: ir.Type) -> ir.Constant:
    """A constant vector."""
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def broadcast(builder: ir.IRBuilder, scalar: Any, lanes: int = LANES) -> Any:
    """A vector with a run-time scalar in every lane."""
    kind = ir.VectorType(scalar.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), splat(0, I32, lanes))


def pointer(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    """`address` as a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: ir.IRBuilder, address: Any, kind: ir.Type, align: int = 1) -> Any:
    """Load a value of type `kind` from any address."""
    return builder.load(pointer(builder, address, kind), align=align)


def store(builder: ir.IRBuilder, value: Any, address: Any, align: int = 1) -> None:
    """Store a value to any address."""
    builder.store(value, pointer(builder, address, value.type), align=align)


def chunks(builder: ir.IRBuilder, width: Any, chunk: Callable[[Any, Any], None]) -> None:
    """Call `chunk(first, mask)` for every 16 of `width` elements; the mask is None but for the last few."""
    with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as loop:
        chunk(builder.mul(loop.index, I64(LANES)), None)
    tail = builder.srem(width, I64(LANES))
    with cgutils.if_unlikely(builder, builder.icmp_signed(">", tail, I64(0))):
        chunk(builder.sub(width, tail), lanes_below(builder, tail))


def load_elements(builder: ir.IRBuilder, row: Any, first: Any, mask: Any, bf16: bool) -> Any:
    """16 elements of a row in memory from element `first` on, as float32; with a mask, those it names."""
    kind = ir.VectorType(I16, LANES) if bf16 else V16F
    address = builder.add(row, builder.mul(first, I64(2 if bf16 else 4)))
    values = load(builder, address, kind) if mask is None else load_masked(builder, address, kind, mask)
    return widen_bf16(builder, values) if bf16 else values


def store_elements(builder: ir.IRBuilder, values: Any, row: Any, first: Any, mask: Any, bf16: bool) -> None:
    """Store 16 float32 as elements of a row from element `first` on; with a mask, those it names."""
    stored = round_bf16(builder, values) if bf16 else values
    address = builder.add(row, builder.mul(first, I64(2 if bf16 else 4)))
    if mask is None:
        store(builder, stored, address)
    else:
        store_masked(builder, stored, address, mask)


def lanes_below(builder: ir.IRBuilder, count: Any, lanes: int = LANES) -> Any:
    """Mask of the first `count` lanes."""
    return builder.icmp_signed("<", constants(range(lanes), I64), broadcast(builder, count, lanes))


def load_masked(builder: ir.IRBuilder, address: Any, kind: ir.VectorType, mask: Any) -> Any:
    """Load the lanes that `mask` names and zeros in the others, touching no other memory."""
    suffix = f"v{kind.count}{kind.element.intrinsic_name}"
    function = declare(
        builder,
        f"llvm.masked.load.{suffix}.p0",
        ir.FunctionType(kind, [kind.as_pointer(), I32, mask.type, kind]),
    )
    zero = ir.Constant(kind, None)
    return builder.call(function, [pointer(builder, address, kind), I32(1), mask, zero])


def store_masked(builder: ir.IRBuilder, value: Any, address: Any, mask: Any) -> None:
    """Store the lanes that `mask` names."""
    kind = value.type
    suffix = f"v{kind.count}{kind.element.intrinsic_name}"
    function = declare(
        builder,
        f"llvm.masked.store.{suffix}.p0",
        ir.FunctionType(ir.VoidType(), [kind, kind.as_pointer(), I32, mask.type]),
    )
    builder.call(function, [value, pointer(builder, address, kind), I32(1), mask])


def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once."""
    function = declare(builder, "llvm.fma.v16f32", ir.FunctionType(V16F, [V16F, V16F, V16F]))
    return builder.call(function, [a, b, c])


def square_root(builder: ir.IRBuilder, value: Any) -> Any:
    """The root of a float32."""
    return builder.call(declare(builder, "llvm.sqrt.f32", ir.FunctionType(F32, [F32])), [value])


def sum_rows(builder: ir.IRBuilder, vectors: Sequence[Any]) -> Any:
    """The sums of the lanes of each of `vectors` (a power of two of them), as one vector."""

    def fold(a: Any, b: Any, lanes: range, run: int) -> Any:
        parts = [constants([i for i in lanes if i // run % 2 == half], I32) for half in (0, 1)]
        return builder.fadd(*(builder.shuffle_vector(a, b, part) for part in parts))

    vectors, run = list(vectors), LANES // 2
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors, run = [fold(a, b, range(2 * LANES), run) for a, b in pairs], run // 2
    total = vectors[0]
    while run:
        total, run = fold(total, total, range(total.type.count), run), run // 2
    return total


def widen_bf16(builder: ir.IRBuilder, halves: Any) -> Any:
    """bfloat16 (as i16) to float32."""
    wide = builder.zext(halves, ir.VectorType(I32, halves.type.count))
    shifted = builder.shl(wide, splat(16, I32, halves.type.count))
    return builder.bitcast(shifted, ir.VectorType(F32, halves.type.count))


def widen_f16(builder: ir.IRBuilder, halves: Any) -> Any:
    """16 finite float16 (as i16) to float32, exactly, without the instruction that some machines lack."""
    wide = builder.zext(halves, V16I)
    sign = builder.shl(builder.and_(wide, splat(0x8000, I32)), splat(16, I32))
    size = builder.shl(builder.and_(wide, splat(0x7FFF, I32)), splat(13, I32))
    exact = builder.fmul(builder.bitcast(size, V16F), splat(2.0**112, F32))
    return builder.bitcast(builder.or_(builder.bitcast(exact, V16I), sign), V16F)


def round_bf16(builder: ir.IRBuilder, floats: Any) -> Any:
    """float32 to bfloat16 (as i16), to nearest, ties to even, NaN kept; any number of lanes."""
    count = floats.type.count
    bits = builder.bitcast(floats, ir.VectorType(I32, count))
    sixteen = splat(16, I32, count)
    odd = builder.and_(builder.lshr(bits, sixteen), splat(1, I32, count))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, splat(0x7FFF, I32, count))), sixteen)
    is_number = builder.fcmp_ordered("ord", floats, floats)
    return builder.trunc(builder.select(is_number, rounded, splat(0x7FC0, I32, count)), ir.VectorType(I16, count))


def narrow_bf16(builder: ir.IRBuilder, floats: Any) -> Any:
    """16 float32 to bfloat16 (as i16), by the machine's own instruction where it has one."""
    if not HAS_BF16:
        return round_bf16(builder, floats)
    name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    kind = ir.FunctionType(ir.VectorType(I16, LANES), [V16F])
    return builder.call(declare(builder, name, kind), [floats])


def dot_pairs(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    """total + the products of 16 pairs of bfloat16, each pair summed into its lane. `a`, `b` as 32 x i16."""
    if HAS_BF16:
        a, b = builder.bitcast(a, V16I), builder.bitcast(b, V16I)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        function = declare(builder, name, ir.FunctionType(V16F, [V16F, V16I, V16I]))
        return builder.call(function, [total, a, b])
    return dot_halves(builder, total, a, bf16_halves(builder, b))


def dot_halves(builder: ir.IRBuilder, total: Any, a: Any, b: tuple[Any, Any]) -> Any:
    """As `dot_pairs`, with the float32 values of b's lower and upper halves."""
    for own, other in zip(bf16_halves(builder, a), b, strict=True):
        total = fma(builder, own, other, total)
    return total


def bf16_halves(builder: ir.IRBuilder, pairs: Any) -> tuple[Any, Any]:
    """The lower and the upper bfloat16 of 16 pairs (32 x i16), as float32."""
    words = builder.bitcast(pairs, V16I)
    low, high = builder.shl(words, splat(16, I32)), builder.and_(words, splat(0xFFFF0000, I32))
    return builder.bitcast(low, V16F), builder.bitcast(high, V16F)


def looked_up(builder: ir.IRBuilder, table: Sequence[float], index: Any) -> Any:
    """16 float32 of a table, by the low bits of 16 lanes of i32: as many bits as `TABLE_LANES` has places."""
    repeated = constants([table[i % len(table)] for i in range(TABLE_LANES)], F32)
    if TABLE_LANES == LANES:
        name = "llvm.x86.avx512.permvar.sf.512"
        return builder.call(declare(builder, name, ir.FunctionType(V16F, [V16F, V16I])), [repeated, index])
    kind = ir.FunctionType(repeated.type, [repeated.type, ir.VectorType(I32, TABLE_LANES)])
    function = declare(builder, "llvm.x86.avx2.permps", kind)
    parts = []
    for first in (0, TABLE_LANES):
        lanes = builder.shuffle_vector(index, index, constants(range(first, first + TABLE_LANES), I32))
        parts.append(builder.call(function, [repeated, lanes]))
    return builder.shuffle_vector(*parts, constants(range(LANES), I32))


def gather_floats(builder: ir.IRBuilder, base: Any, index: Any, mask: Any) -> Any:
    """float32 values at `base + 4 * index` for the lanes that `mask` names."""
    offsets = builder.mul(builder.sext(index, ir.VectorType(I64, LANES)), splat(4, I64))
    pointers = builder.inttoptr(builder.add(broadcast(builder, base), offsets), ir.VectorType(F32.as_pointer(), LANES))
    function = declare(
        builder,
        "llvm.masked.gather.v16f32.v16p0",
        ir.FunctionType(V16F, [pointers.type, I32, mask.type, V16F]),
    )
    return builder.call(function, [pointers, I32(4), mask, ir.Constant(V16F, None)])


@functools.cache
def float_bits(value: float) -> int:
    """The bits of a number as float32, as an unsigned integer."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def bf16_bits(value: float) -> int:
    """The bfloat16 of a number that it holds exactly, as an unsigned 16-bit integer."""
    return float_bits(value) >> 16


def declare(builder: ir.IRBuilder, name: str, kind: ir.FunctionType) -> Any:
    """An LLVM intrinsic by name."""
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _scalar(kind: ir.Type, widen: Callable[[ir.IRBuilder, Any], Any]) -> Emit:
    return lambda builder, args: widen(builder, load(builder, args[0], kind))


def _widen_one_bf16(builder: ir.IRBuilder, half: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(half, I32), I32(16)), F32)


def _widen_one_f16(builder: ir.IRBuilder, half: Any) -> Any:
    return builder.extract_element(widen_f16(builder, broadcast(builder, half)), I32(0))


read_i32 = emitted(1, _scalar(I32, lambda b, v: b.sext(v, I64)), types.int64)
read_i64 = emitted(1, _scalar(I64, lambda b, v: v), types.int64)
read_f32 = emitted(1, _scalar(F32, lambda b, v: v), types.float32)
read_f16 = emitted(1, _scalar(I16, _widen_one_f16), types.float32)
read_bf16 = emitted(1, _scalar(I16, _widen_one_bf16), types.float32)
read_i16 = emitted(1, _scalar(I16, lambda b, v: b.zext(v, I64)), types.int64)
write_i16 = emitted(2, lambda b, a: store(b, b.trunc(a[1], I16), a[0]))
write_i64 = emitted(2, lambda b, a: store(b, a[1], a[0]))
write_i32 = emitted(2, lambda b, a: store(b, b.trunc(a[1], I32), a[0]))


def _prefetch(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
    byte = ir.IntType(8).as_pointer()
    function = declare(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]))
    with cgutils.for_range(builder, builder.sdiv(builder.add(args[1], I64(63)), I64(64))) as loop:
        line = builder.add(args[0], builder.mul(loop.index, I64(64)))
        builder.call(function, [pointer(builder, line, ir.IntType(8)), I32(0), I32(2), I32(1)])


prefetch = emitted(2, _prefetch)
"""f(address, bytes): bring memory into the second-level cache."""


def _copy(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(1)
    function = declare(builder, "llvm.memcpy.p0.p0.i64", ir.FunctionType(ir.VoidType(), [byte, byte, I64, flag]))
    source, target, size = args
    given, taken = (pointer(builder, address, ir.IntType(8)) for address in (source, target))
    builder.call(function, [taken, given, size, flag(0)])


copy = emitted(3, _copy)
"""f(source, target, bytes)."""


def _fetch_add(builder: ir.IRBuilder, args: Sequence[Any]) -> Any:
    return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "acq_rel")


fetch_add = emitted(2, _fetch_add, types.int64)


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """The bits of a float32 as a non-negative int64."""

    def codegen(_c: Any, builder: ir.IRBuilder, _s: Any, args: Sequence[Any]) -> Any:
        return builder.zext(builder.bitcast(args[0], I32), I64)

    return types.int64(types.float32), codegen
