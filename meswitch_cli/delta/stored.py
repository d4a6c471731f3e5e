"""What an artifact keeps of a parameter: the table of its parts, the tensors, and the manifest's entry for them.

Whatever writes, reads, checks, counts or loads a stored tensor goes by `PARTS`. A further part is a line there, a field
of `StoredDelta` and, where kernels compute with it, theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meswitch_cli.delta import exact
from meswitch_cli.delta.codes import CODES, TRELLIS_VERSION, TrellisCode, listed, packed_width, unpack
from meswitch_cli.delta.low_rank import ALONE_VERSION, FACTOR_BITS, FACTOR_WIDTHS, HALF_BITS, vectors_of
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.steps import multiples_of
from meswitch_cli.delta.trellis import decode

#: Noise of the trellis codes over the least possible, on the heaviest tails of ordinary deltas: a Laplacian's at 1 bit.
ABOVE_LEAST_NOISE = 1.75


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of the expert, as the manifest lists it.

    With `exact` a tensor is stored as so many bytes of what makes it of the base's, see `delta.exact`. Otherwise a
    `dense` tensor is stored whole; the others as codes against the base tensor `base`, whose shape is
    `base_shape`; rows beyond the base's are stored in `added_rows` rows of 16 bit. `taps` and `states` are a trellis
    code's (see `TrellisCode`). A low-rank part may stand alone, with 0 bits. Errors are relative (see `DeltaError`),
    None where they were not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    base: str
    base_shape: tuple[int, ...]
    layer: int | None = None
    shard: str = ""
    nbytes: int = 0
    bits: float = 0
    code: str = "scalar"
    taps: tuple[int, ...] = ()
    states: int = 0
    salient: int = 0
    group_size: int = 0
    channel_scale: bool = False
    rank: int = 0
    factor_bits: int = FACTOR_BITS
    exact: int = 0
    added_rows: int = 0
    delta_energy: float | None = None
    weight_error: float | None = None
    output_error: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def projection(self) -> str:
        """The last part of the weight's name: q_proj, down_proj, ..."""
        return projection_of(self.name)

    @property
    def rows(self) -> int:
        """Rows that the base has too."""
        return min(self.shape[0], self.base_shape[0])

    @property
    def shared_shape(self) -> tuple[int, ...]:
        """Shape of what the base has too."""
        return self.shape if self.shape == self.base_shape else (self.rows, *self.shape[1:])

    @property
    def groups(self) -> int:
        """Steps of a row."""
        return -(-self.shape[1] // self.group_size) if self.group_size else 1

    @property
    def trellis(self) -> TrellisCode | None:
        """Its trellis code; None where its codes are scalar, or it has none."""
        return TrellisCode(self.bits, self.taps, self.states) if self.code == "trellis" else None

    @property
    def width(self) -> int:
        """Bits that a weight takes where it is computed with: a trellis code is decoded for that."""
        return self.trellis.width if self.trellis else int(self.bits)

    @property
    def code_words(self) -> int:
        """Words of a row's codes, as they are stored."""
        columns = self.shape[1]
        return self.trellis.words(columns) if self.trellis else packed_width(columns, self.width)

    @property
    def usual_error(self) -> float:
        """A weight error that an ordinary delta does not exceed: all of the delta, or what so few bits must cost."""
        return max(1.0, ABOVE_LEAST_NOISE * self.trellis.least_noise) if self.trellis else 1.0

    @property
    def parts(self) -> list[Part]:
        """What is stored of it."""
        return [part for part in PARTS if part.present(self)]

    @property
    def version(self) -> int:
        """The first version of the artifact's format whose readers know all of this."""
        of_code = [TRELLIS_VERSION if self.trellis else CODES[self.width].version] if self.bits else []
        alone = self.rank and (not self.bits or self.factor_bits != FACTOR_BITS)
        return max(of_code + [part.version for part in self.parts] + [ALONE_VERSION if alone else 1])

    def expected_nbytes(self, itemsize: int) -> int:
        """Bytes of its parts as they are written; `itemsize` are those of a number of the expert's own."""
        return sum(part.nbytes(self, itemsize) for part in self.parts)

    def problem(self) -> str | None:
        """What an entry cannot say; None where it can be."""
        if self.exact and (self.bits or self.rank):
            return "what is stored bit for bit has no codes"
        if self.exact and self.kind == "dense" and self.shape != self.base_shape:
            return f"shape {list(self.shape)} does not go with base shape {list(self.base_shape)}"
        if self.kind == "dense":
            settings = (self.bits, self.trellis, self.taps, self.states, self.salient, self.group_size)
            quantised = any((*settings, self.channel_scale, self.rank, self.added_rows))
            return "a dense tensor cannot have quantisation settings" if quantised else None
        if len(self.shape) != 2 or len(self.base_shape) != 2 or self.shape[1] != self.base_shape[1]:
            return f"shape {list(self.shape)} does not go with base shape {list(self.base_shape)}"
        if self.trellis:
            problem = self.trellis.problem()
            if problem:
                return problem
        elif self.taps or self.states:
            return "scalar codes have neither taps nor states"
        elif self.bits not in CODES and (
            self.bits or (self.shape == self.base_shape and not self.rank and not self.exact)
        ):
            return f"bits must be {listed(CODES)}, not {self.bits}"
        scalar = self.bits and not self.trellis
        uneven = self.group_size % CODES[self.width].group_multiple if scalar else self.group_size
        if self.salient > self.shape[1] or uneven:
            return f"salient {self.salient} or group size {self.group_size} is impossible"
        if self.rank > min(self.rows, self.shape[1]):
            return f"rank {self.rank} is impossible"
        if self.factor_bits not in (FACTOR_WIDTHS if self.rank else (FACTOR_BITS,)):
            return f"factors of {self.factor_bits} bits are impossible"
        if self.added_rows != max(0, self.shape[0] - self.base_shape[0]):
            return f"{self.added_rows} added rows do not go with the shapes"
        return None


def projection_of(name: str) -> str:
    """The last part of a weight's name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def code_members(bits: float, trellis: TrellisCode | None) -> dict[str, Any]:
    """The members of a `TensorEntry` that tell of a code."""
    if trellis is None:
        return {"bits": bits, "code": "scalar", "taps": (), "states": 0}
    return {"bits": trellis.bits, "code": "trellis", "taps": trellis.taps, "states": trellis.states}


def expected_entry(
    settings: QuantizerSettings, shape: tuple[int, ...], base_shape: tuple[int, ...] | None = None
) -> TensorEntry:
    """The entry, without names, of a tensor that is quantised with these settings and differs from the base's."""
    base_shape, code = base_shape or shape, settings.coding if settings.bits else None
    return TensorEntry(
        name="",
        kind="linear",
        shape=shape,
        base="",
        base_shape=base_shape,
        **code_members(settings.bits, code if isinstance(code, TrellisCode) else None),
        salient=settings.salient,
        group_size=settings.group_size,
        channel_scale=settings.channel_scale != "none",
        rank=min(settings.rank, *shape, *base_shape),
        factor_bits=settings.factor_bits if settings.rank else FACTOR_BITS,
        added_rows=max(0, shape[0] - base_shape[0]),
    )


class Part(NamedTuple):
    """One tensor of those that may be stored of a parameter.

    Attributes:
        present, shape: of an entry.
        dtypes: any of these is read; `quantize` writes the first, with steps in groups the last.
        version: of the artifact's format, the first whose readers know the part.
    """

    name: str
    present: Callable[[TensorEntry], Any]
    shape: Callable[[TensorEntry], tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    version: int = 1

    def nbytes(self, entry: TensorEntry, itemsize: int) -> int:
        """Bytes of it as it is written; `itemsize` are those of a number of the expert's own."""
        written = itemsize if self.dtypes is _OWN else self.dtypes[-1 if entry.group_size else 0].itemsize
        return math.prod(self.shape(entry)) * written


_INT, _HALF, _SINGLE = (torch.int32,), (torch.float16,), (torch.float32,)
_OWN = (torch.bfloat16, torch.float16, torch.float32)


def _factor(side: str, length: Callable[[TensorEntry], int]) -> tuple[Part, Part, Part]:
    """One side of a low-rank part: codes, or values of 16 bits, and their steps."""

    def is_coded(entry: TensorEntry) -> bool:
        return entry.rank > 0 and entry.factor_bits != HALF_BITS

    return (
        Part(f"{side}_codes", is_coded, lambda e: (e.rank, packed_width(length(e), e.factor_bits)), _INT, 2),
        Part(
            f"{side}_values", lambda e: e.rank and not is_coded(e), lambda e: (e.rank, length(e)), _HALF, ALONE_VERSION
        ),
        Part(f"{side}_steps", lambda e: e.rank, lambda e: (e.rank, 1), _SINGLE, 2),
    )


PARTS = (
    Part("codes", lambda e: e.bits, lambda e: (e.rows, e.code_words), _INT),
    Part("steps", lambda e: e.bits, lambda e: (e.rows, e.groups), _SINGLE + _HALF),
    Part("salient_index", lambda e: e.bits and e.salient, lambda e: (e.salient,), _INT),
    Part("salient_value", lambda e: e.bits and e.salient, lambda e: (e.rows, e.salient), (*_HALF, torch.bfloat16)),
    Part("channel_scale", lambda e: e.bits and e.channel_scale, lambda e: (e.shape[1],), _HALF),
    *_factor("left", lambda e: e.rows),
    *_factor("right", lambda e: e.shape[1]),
    Part("added_rows", lambda e: e.added_rows, lambda e: (e.added_rows, e.shape[1]), _OWN),
    Part("value", lambda e: e.kind == "dense" and not e.exact, lambda e: e.shape, _OWN),
    Part("exact", lambda e: e.exact, lambda e: (e.exact,), (torch.uint8,), ALONE_VERSION),
)


@dataclass(frozen=True, kw_only=True)
class StoredDelta:
    """The parts that are stored of a parameter, `[out, in]` but for a whole one; None where there is none.

    Attributes:
        bits: what the codes store for a weight, 0 without codes.
        trellis: the trellis code; None where the codes are scalar.
        in_features: input channels (the codes' words may hold padding).
        out_features: output channels of a low-rank part that stands alone.
        group_size: input channels that share a step; 0 is one step per output channel.
        codes: `[out, ceil(in * bits / 32)]` int32, or a trellis code's messages.
        steps: `[out, groups]` fp32 (fp16 where groups are used and the values allow it).
        salient_index: `[k]` int32, ascending.
        salient_value: `[out, k]` fp16, what to add to the rest in those channels.
        channel_scale: `[in]` fp16; None is all ones.
        factor_bits: width of the numbers of a low-rank part.
        left_codes, left_steps, right_codes, right_steps: the vectors of a low-rank part, added to the codes' values
            everywhere: codes `[rank, ceil(length * factor_bits / 32)]` int32, steps `[rank, 1]` fp32.
        left_values, right_values: in the codes' place where factors have 16 bits, fp16 `[rank, length]`.
        added_rows: `[added, in]`, rows that the base has not.
        value: the parameter itself, where it is stored whole.
        exact: the stream, uint8 `[n]`, that makes it of the base's rows.
    """

    bits: float = 0
    trellis: TrellisCode | None = None
    in_features: int = 0
    out_features: int = 0
    group_size: int = 0
    factor_bits: int = FACTOR_BITS
    codes: Tensor | None = None
    steps: Tensor | None = None
    salient_index: Tensor | None = None
    salient_value: Tensor | None = None
    channel_scale: Tensor | None = None
    left_codes: Tensor | None = None
    left_values: Tensor | None = None
    left_steps: Tensor | None = None
    right_codes: Tensor | None = None
    right_values: Tensor | None = None
    right_steps: Tensor | None = None
    added_rows: Tensor | None = None
    value: Tensor | None = None
    exact: Tensor | None = None

    @classmethod
    def of(cls, entry: TensorEntry, tensors: Mapping[str, Tensor]) -> StoredDelta:
        """An entry's tensors, by their parts' names, whose shapes and types have been checked.

        Raises:
            ValueError: salient indices are not ascending channels of the tensor, a number is not finite, or a stream is
                damaged.
        """
        stream = tensors.get("exact")
        if stream is not None:
            exact.check(stream, math.prod(entry.shared_shape))
        rows, columns = (entry.rows, entry.shape[1]) if entry.bits or entry.rank else (0, 0)
        index = tensors.get("salient_index")
        if index is not None and not (
            int(index[0]) >= 0 and int(index[-1]) < columns and bool((index[1:] > index[:-1]).all())
        ):
            raise ValueError(f"salient channels are not ascending and below {columns}")
        for tensor in tensors.values():
            if tensor.is_floating_point() and not _all_finite(tensor):
                raise ValueError("a stored number is not finite")
        return cls(
            bits=entry.bits,
            trellis=entry.trellis,
            in_features=columns,
            out_features=0 if entry.bits else rows,
            group_size=entry.group_size,
            factor_bits=entry.factor_bits,
            **tensors,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is, by the parts' names."""
        found = {part.name: getattr(self, part.name) for part in PARTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored_as(self) -> dict[str, Any]:
        """What its entry says of it: the members of `TensorEntry` that tell how a tensor is stored."""
        return {
            "nbytes": self.nbytes,
            **code_members(self.bits, self.trellis),
            "salient": len(self.salient_channels),
            "group_size": self.group_size,
            "channel_scale": self.channel_scale is not None,
            "rank": 0 if self.left_steps is None else len(self.left_steps),
            "factor_bits": self.factor_bits,
            "exact": 0 if self.exact is None else len(self.exact),
            "added_rows": 0 if self.added_rows is None else len(self.added_rows),
        }

    @property
    def coded(self) -> tuple[Tensor, Tensor]:
        """Codes and steps.

        Raises:
            ValueError: there are none.
        """
        if self.codes is None or self.steps is None:
            raise ValueError("this parameter is stored without codes")
        return self.codes, self.steps

    @property
    def salient_channels(self) -> Tensor:
        """`[k]` int64, ascending; empty where there are none."""
        return torch.empty(0, dtype=torch.long) if self.salient_index is None else self.salient_index.long()

    def multiples(self) -> Tensor:
        """The multiples of the step that the codes stand for, fp32 `[out, in]`."""
        scalar = self.scalar()
        width = int(scalar.bits)
        return multiples_of(unpack(scalar.coded[0], width, self.in_features), width)

    def scalar(self, device: torch.device | str | None = None) -> StoredDelta:
        """The same delta with a trellis code's messages decoded, on a device to which they are sent (None: where they
        are): scalar codes of 1 or 2 bits and their steps. Itself where the codes are scalar."""
        if self.trellis is None:
            return self
        messages = self.coded[0].to(device or self.coded[0].device, non_blocking=True)
        codes = decode(messages, self.trellis, self.in_features)
        return replace(self, bits=self.trellis.width, trellis=None, codes=codes)

    def factors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor] | None:
        """L `[out, rank]` and R `[rank, in]` of the low-rank part, fp32 on a device to which what is stored is sent."""
        left, right = (
            self.left_codes if self.left_values is None else self.left_values,
            self.right_codes if self.right_values is None else self.right_values,
        )
        if left is None or self.left_steps is None or right is None or self.right_steps is None:
            return None
        stored = (left, self.left_steps, right, self.right_steps)
        left, left_steps, right, right_steps = (part.to(device, non_blocking=True) for part in stored)
        rows = self.out_features or len(self.coded[0])
        return (
            vectors_of(left, left_steps, rows, self.factor_bits).T,
            vectors_of(right, right_steps, self.in_features, self.factor_bits),
        )

    def named(self, name: str) -> dict[str, Tensor]:
        """Its tensors by their names in a shard, `name` being the parameter's."""
        return {f"{name}.{part}": tensor for part, tensor in self.tensors.items()}

    def mapped(self, function: Callable[[Tensor], Tensor]) -> StoredDelta:
        """What a function makes of every tensor."""
        changed: dict[str, Any] = {part: function(tensor) for part, tensor in self.tensors.items()}
        return replace(self, **changed)


def _all_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # NaN wins; one pass, where isfinite takes fifty times as long
    return math.isfinite(low.item()) and math.isfinite(high.item())
