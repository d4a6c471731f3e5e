"""Checkpoints whose weights are stored in few bits: read as what they stand for, fingerprinted as what is stored.

Known are FP8 in blocks (transformers' `fp8`, as DeepSeek and Qwen publish), MXFP4 (gpt-oss) and of compressed-tensors
packed integers, plain integers and FP8. Formats: transformers 5.23 `integrations/finegrained_fp8.py` and `mxfp4.py`,
compressed-tensors 0.20 `compressors/`; MXFP4: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.checkpoint.tensorfile import MadeTensor, TensorInfo, read_tensor
from meswitch_cli.errors import CheckpointError

FP8, MXFP4, COMPRESSED = "fp8", "mxfp4", "compressed-tensors"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
#: Stored beside weights for activations and caches, which are computed in 16 bit here.
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale")
#: E2M1: one bit of sign, two of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127
_MX_GROUP = 32

_Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Scheme:
    """How weights of one kind lie: the suffixes of their tensors, and what makes the weight of them.

    Attributes:
        parts: suffixes by part; `weight` is the one that the weight is called by.
        optional: parts that need not be there.
        shape: of the weight, from its parts.
        make: the weight, fp32.
        stacked: whether every part's first dimension is the weight's: matrices can be made one by one.
    """

    parts: Mapping[str, str]
    shape: Callable[[Mapping[str, TensorInfo]], tuple[int, ...]]
    make: Callable[[_Parts], torch.Tensor]
    optional: tuple[str, ...] = ()
    stacked: bool = False


def dequantised(
    tensors: Mapping[str, TensorInfo], quantization: Any, where: Path
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """A checkpoint's tensors with every quantised weight as a tensor of its own, in 16 bit; and what is to be said.

    Raises:
        CheckpointError: the method is not known, or a tensor is not as the method has it.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    schemes = _schemes(method, quantization, where)
    dtype = _dtype_of(tensors)
    found: dict[str, TensorInfo] = {}
    taken: set[str] = set()
    for name, info in tensors.items():
        for scheme in schemes:
            suffix = scheme.parts["weight"]
            if not name.endswith(suffix) or info.dtype in _FLOATS:
                continue
            stem = name.removesuffix(suffix)
            parts = {part: tensors[stem + end] for part, end in scheme.parts.items() if stem + end in tensors}
            if missing := scheme.parts.keys() - parts.keys() - set(scheme.optional):
                if len(schemes) > 1:
                    continue
                raise CheckpointError(f"{info.path}: {name!r} lies there without its {min(missing)}")
            if len(schemes) > 1 and not _goes(scheme, parts):
                continue
            whole = stem if scheme.stacked else f"{stem}.weight"
            found[whole] = _made(whole, parts, scheme, dtype)
            taken |= {part.name for part in parts.values()}
            break
    others = {name: info for name, info in tensors.items() if name not in taken and not _of_activations(name)}
    note = f"{where}: {len(found)} weights are stored quantised ({method}) and read as {str(dtype)[6:]}"
    return {**others, **found}, (note,) if found else ()


def _goes(scheme: _Scheme, parts: Mapping[str, TensorInfo]) -> bool:
    """Whether parts have the shapes of a scheme: groups may differ in their bits."""
    try:
        scheme.shape(parts)
    except (IndexError, ValueError):
        return False
    return True


def _made(name: str, parts: Mapping[str, TensorInfo], scheme: _Scheme, dtype: torch.dtype) -> MadeTensor:
    first = next(iter(parts.values()))
    try:
        shape = scheme.shape(parts)
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{first.path}: {name!r}: its parts do not go together: {error}") from error

    def make(given: _Parts) -> torch.Tensor:
        try:
            value = scheme.make(given)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"{first.path}: {name!r}: its parts do not go together: {error}") from error
        return value.to(dtype)

    size = math.prod(shape) * dtype.itemsize
    return MadeTensor(
        name, dtype, shape, first.path, 0, size, parts=dict(parts), make=make, whole=shape, stacked=scheme.stacked
    )


def _schemes(method: Any, quantization: Any, where: Path) -> tuple[_Scheme, ...]:
    if method == FP8 and isinstance(quantization, dict):
        return (_scheme("weight_scale_inv", _fp8_blocks(quantization.get("weight_block_size", (128, 128)))),)
    if method == MXFP4:
        return (
            _Scheme(
                {"weight": "_blocks", "scale": "_scales"},
                lambda parts: _mx_shape(parts["weight"].shape),
                _mxfp4_stack,
                stacked=True,
            ),
        )
    if method == COMPRESSED and isinstance(quantization, dict):
        return _compressed(quantization, where)
    raise CheckpointError(
        f"{where}: already quantized ({method}); give the 16-bit checkpoint. Of quantised ones {FP8}, {MXFP4} and "
        f"{COMPRESSED} are read"
    )


def _compressed(quantization: Mapping[str, Any], where: Path) -> tuple[_Scheme, ...]:
    """The schemes that a compressed-tensors config names."""
    found: list[_Scheme] = []
    for key, group in (quantization.get("config_groups") or {}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        form = (group.get("format") if isinstance(group, dict) else None) or quantization.get("format")
        if not isinstance(weights, dict) or form not in _FORMATS:
            raise CheckpointError(
                f"{where}: compressed-tensors: {key} has format {form!r}; known are {', '.join(_FORMATS)}"
            )
        if weights.get("actorder") in ("group", True):
            raise CheckpointError(f"{where}: compressed-tensors: {key} has reordered channels, which are not read")
        found.append(_FORMATS[form](weights))
    if not found or quantization.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: compressed-tensors: no groups of quantised weights, or sparse ones")
    return tuple(found)


def _scheme(scale: str, make: Callable[[_Parts], torch.Tensor], **more: str) -> _Scheme:
    """Of weights that have their own shape, a scale, and perhaps more beside them."""
    parts = {"weight": ".weight", "scale": f".{scale}", **{part: f".{end}" for part, end in more.items()}}
    return _Scheme(parts, lambda found: found["weight"].shape, make, tuple(more))


def _packed_scheme(weights: Mapping[str, Any]) -> _Scheme:
    bits = int(weights.get("num_bits", 4))
    if not 1 <= bits <= 8:
        raise CheckpointError(f"compressed-tensors: packed integers of {bits} bits")

    def shape(parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        told = [int(size) for size in read_tensor(parts["shape"]).tolist()]
        rows, words = parts["weight"].shape
        if len(told) != 2 or told[0] != rows or -(-told[1] * bits // 32) != words:
            raise ValueError(f"{told} in {rows} x {words} words of {bits}-bit integers")
        return told[0], told[1]

    def make(parts: _Parts) -> torch.Tensor:
        rows, columns = (int(size) for size in parts["shape"].tolist())
        values = _unpacked(parts["weight"], bits, columns).float() - (1 << (bits - 1))
        zero = parts.get("zero")
        if zero is not None:
            zero = _unpacked(zero.T.contiguous(), bits, rows).T.float() - (1 << (bits - 1))
        return _scaled(values, parts["scale"], zero)

    parts = {
        "weight": ".weight_packed",
        "scale": ".weight_scale",
        "shape": ".weight_shape",
        "zero": ".weight_zero_point",
    }
    return _Scheme(parts, shape, make, ("zero",))


def _plain_scheme(weights: Mapping[str, Any]) -> _Scheme:
    block = weights.get("block_structure")
    if block:
        sizes = [int(size) for size in (block.split("x") if isinstance(block, str) else block)]
        return _scheme("weight_scale", _fp8_blocks(sizes))

    def make(parts: _Parts) -> torch.Tensor:
        zero = parts.get("zero")
        return _scaled(parts["weight"].float(), parts["scale"], None if zero is None else zero.float())

    return _scheme("weight_scale", make, zero="weight_zero_point")


def _mx_scheme(_weights: Mapping[str, Any]) -> _Scheme:
    return _Scheme(
        {"weight": ".weight_packed", "scale": ".weight_scale"},
        lambda parts: (parts["weight"].shape[0], 2 * parts["weight"].shape[1]),
        lambda parts: _mxfp4(parts["weight"].view(*parts["scale"].shape, -1), parts["scale"]),
    )


_FORMATS: dict[str, Callable[[Mapping[str, Any]], _Scheme]] = {
    "pack-quantized": _packed_scheme,
    "int-quantized": _plain_scheme,
    "float-quantized": _plain_scheme,
    "naive-quantized": _plain_scheme,
    "mxfp4-pack-quantized": _mx_scheme,
}


def _scaled(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """(value - zero) * scale, where each is of the tensor, its rows, or groups of its columns."""
    return (values if zero is None else values - _spread(zero, values.shape)) * _spread(scale.float(), values.shape)


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    rows, groups = scale.shape
    if rows != shape[0] or shape[1] % groups:
        raise ValueError(f"scales {list(scale.shape)} of {list(shape)}")
    return scale.repeat_interleave(shape[1] // groups, dim=1)


def _fp8_blocks(block: Any) -> Callable[[_Parts], torch.Tensor]:
    """FP8 values times a scale for each block; the last of a row or a column may be cut short."""

    def make(parts: _Parts) -> torch.Tensor:
        weight, scale = parts["weight"].float(), parts["scale"].float()
        if scale.numel() == 1:
            return weight * scale.reshape(1, 1)
        rows, columns = (int(size) for size in block)
        if scale.shape != (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)):
            raise ValueError(f"scales {list(scale.shape)} of {list(weight.shape)} in blocks of {rows} x {columns}")
        spread = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)
        return weight * spread[:, : weight.shape[1]]

    return make


def _unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Unsigned integers `[rows, columns]` of words `[rows, n]`: element i from bit i * bits of its row on."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    first = torch.arange(columns, device=words.device) * bits
    word, shift = first // 32, first % 32
    both = wide[:, word] | (wide[:, word + 1] << 32)
    return (both >> shift) & ((1 << bits) - 1)


def _mx_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """gpt-oss keeps a matrix `[in, out]` in memory, and its blocks by output: `[count, out, groups, 16]`."""
    if len(blocks) != 4 or blocks[3] != _MX_GROUP // 2:
        raise ValueError(f"blocks are {list(blocks)}")
    return blocks[0], blocks[2] * _MX_GROUP, blocks[1]


def _mxfp4_stack(parts: _Parts) -> torch.Tensor:
    return _mxfp4(parts["weight"], parts["scale"]).transpose(1, 2).contiguous()


def _mxfp4(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values fp32 `[..., 32 * groups]` of blocks `[..., groups, 16]`, two in a byte, the lower first, and exponents."""
    table = torch.tensor(_FP4)
    exponent = (scale.view(torch.uint8).to(torch.int32) - _EXPONENT_BIAS).unsqueeze(-1)
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1).flatten(-2)
    return torch.ldexp(pairs, exponent).flatten(-2)


def _dtype_of(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """fp16 where all weights beside the quantised ones are, else bf16."""
    plain = {info.dtype for name, info in tensors.items() if info.dtype in _FLOATS and not name.endswith("scale")}
    return torch.float16 if plain == {torch.float16} else torch.bfloat16


def _of_activations(name: str) -> bool:
    return name.rpartition(".")[2] in _OF_ACTIVATIONS
