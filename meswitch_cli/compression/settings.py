"""What `meswitch compress` was asked to do, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from meswitch_cli.artifact.served import UNRELATED_BITS
from meswitch_cli.delta.codes import RATES, TRELLIS_CODES, CodeName, default_code, listed
from meswitch_cli.delta.low_rank import FACTOR_BITS, FACTOR_WIDTHS, HALF_BITS
from meswitch_cli.delta.settings import MAX_RANK, ChannelScale, QuantizerSettings, Rounding, StepRule
from meswitch_cli.errors import UsageError

#: What a budget chooses tensor by tensor.
CHOSEN_BY_BUDGET = ("bits", "code", "salient", "rank", "embedding_bits", "embedding_rank")
_TOLD_IF_GIVEN = ("code", "factor_bits", "embedding_rank", "exact", "size", "target_bits")
#: Width of an adapter's factors: what adapters are trained in.
ADAPTER_FACTOR_BITS = 16
#: Calibration by random tokens.
RANDOM = "random"

StepMethod = Literal["least-squares", "unbiased", "output-unbiased", "layerwise", "distill"]


#: The step rule with the lowest KL to the full experts of those that stream, on the choice items of
#: docs/results/compression.md, with calibration data and without.
DEFAULT_STEPS: StepMethod = "output-unbiased"
#: With its low-rank part nearer to strong fine-tunes than 2 bits without, in fewer bytes: docs/results/compression.md.
DEFAULT_BITS: float = 1


def default_channel_scale(bits: float, code: CodeName) -> ChannelScale:
    """By the same items: at 1 bit the scale lowers the mean KL of the three experts, above it does not."""
    return "rms" if bits == 1 and code == "scalar" else "none"


#: Directions cut KL to a tenth at 1 bit, to a sixteenth at 2 (docs/results/compression.md).
DEFAULT_RANK = 16
#: Of embedding and head. A few tokens hold most of such a factor: with 4 bits, and one step for all of them, the KL of
#: the whole is 1.6 times as large (docs/results/trellis.md).
EMBEDDING_FACTOR_BITS = 8
#: An eighth of a bit beside them makes it 1.6 times as large, too.
LEAST_EMBEDDING_BITS = 0.25


def default_embedding_rank(rank: int) -> int:
    """As many as a linear has by default, for a user who wants directions at all."""
    return DEFAULT_RANK if rank else 0


def default_embedding_bits(bits: float, code: CodeName, rank: int) -> float:
    """Beside `rank` directions as many as the linears have, between a quarter of a bit and 1, and half as many beyond:
    the directions hold 80 to 93 % of the delta's energy, and further bits are better spent on linears. Alone 2 bits,
    or 1 by a trellis code beside such codes (docs/results/trellis.md)."""
    if rank:
        own = bits or DEFAULT_BITS
        return min(max(own, LEAST_EMBEDDING_BITS), max(1, own / 2))
    return 1 if code == "trellis" else max(2, bits)


#: What a slot's code of an expert that is stored bit for bit has, where the user says nothing: docs/results/sparse.md.
#: Factors lie in a slot in 16 bits anyway, and rounded to 4 they are what limits such a code.
SERVED_BITS, SERVED_FACTOR_BITS = 2, HALF_BITS


def default_factor_bits(bits: float) -> int:
    """From 2 bits on, and without codes, the rounding of factors to 4 bits is what limits: docs/results/sparse.md."""
    return 8 if bits >= 2 or not bits else FACTOR_BITS


@dataclass(frozen=True)
class CompressionSettings:
    """Everything that decides an artifact's bytes besides the two checkpoints.

    Attributes:
        bits, salient, rank, group_size, channel_scale, rounding, code: as in `QuantizerSettings`, for the decoder's
            linears. With 0 bits these have no salient channels, and no steps to fit: what is said of both is of a head.
        steps: as there, or `distill`: unbiased steps trained end to end afterwards.
        embedding_bits: what the codes of embedding and head store for a weight; a trellis code's where the linears'
            are, too, if there is one.
        embedding_rank: leading directions that are kept of embedding and head, beside their codes.
        calibration: SHA-256 of the calibration file, `RANDOM` for random tokens in its place, None for no statistics.
        samples, sequence_length: calibration windows and their tokens.
        factor_bits: width of the factors' numbers; None is 16 of an adapter's, `EMBEDDING_FACTOR_BITS` of embedding and
            head, of others as `default_factor_bits`.
        exact: whether the expert is stored bit for bit; bits and the like are those of the code that an engine makes
            of it at loading.
        seed: order of the calibration items and of the batches of `distill`; the random tokens.
        size: bytes that the artifact's tensors may take; or
        target_bits: those bytes in bits a weight of the model. With either, `CHOSEN_BY_BUDGET` are chosen tensor by
            tensor, and what the fields of those names hold says nothing.

    Raises:
        UsageError: a value is not possible, or needs calibration data that was not given.
    """

    bits: float = 2
    salient: int = 8
    rank: int = 0
    group_size: int = 0
    channel_scale: ChannelScale = "none"
    rounding: Rounding = "nearest"
    steps: StepMethod = "unbiased"
    embedding_bits: float = 2
    embedding_rank: int = 0
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    code: CodeName | None = None
    factor_bits: int | None = None
    exact: bool = False
    size: int | None = None
    target_bits: float | None = None

    def __post_init__(self) -> None:
        if self.has_budget:
            self._check_budget()
        if self.steps not in get_args(StepMethod):
            raise UsageError(f"--steps must be one of {', '.join(get_args(StepMethod))}, not {self.steps!r}")
        if self.factor_bits not in (None, *FACTOR_WIDTHS):
            raise UsageError(f"--factor-bits must be {listed(FACTOR_WIDTHS)}, not {self.factor_bits}")
        if not self.bits:
            self._check_without_codes()
        try:
            linears = self.linears()
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.embedding_bits not in RATES:
            raise UsageError(f"--embedding-bits must be {listed(RATES)}, not {self.embedding_bits}")
        if not 0 <= self.embedding_rank <= MAX_RANK:
            raise UsageError(f"--embedding-rank must lie between 0 and {MAX_RANK}, not {self.embedding_rank}")
        if self.exact and self.embedding_rank:
            raise UsageError("--embedding-rank: the code of --exact is made at loading, without directions there")
        if self.samples < 1 or self.sequence_length < 8:
            raise UsageError("--samples must be at least 1 and --sequence-length at least 8")
        if self.calibration in (None, RANDOM) and (linears.needs_gram or self.steps == "distill"):
            wanted = "--rounding feedback" if self.rounding == "feedback" else f"--steps {self.steps}"
            raise UsageError(f"{wanted} needs calibration data: give --calibration FILE.jsonl")

    def _check_budget(self) -> None:
        asked = "--size" if self.size is not None else "--target-bits"
        if self.size is not None and self.target_bits is not None:
            raise UsageError("--size and --target-bits exclude each other")
        if (self.size is not None and self.size < 1) or (self.target_bits is not None and not self.target_bits > 0):
            raise UsageError(f"{asked} must be more than 0, not {self.size or self.target_bits}")
        if self.calibration is None:
            raise UsageError(f"{asked} asks tokens what matters: it cannot be given with --calibration none")
        if self.exact:
            raise UsageError(f"{asked} chooses codes, of which --exact has none")
        if self.group_size or self.rounding != "nearest":
            raise UsageError(f"{asked} takes trellis codes, which have no --group-size and no --rounding feedback")

    def _check_without_codes(self) -> None:
        if not self.rank:
            raise UsageError("--bits 0 keeps a delta's leading directions alone: give --rank, 1 or more")
        of_codes = {
            "--code": self.code is not None,
            "--group-size": self.group_size > 0,
            "--channel-scale": self.channel_scale != "none",
            "--rounding": self.rounding != "nearest",
            f"--steps {self.steps}": self.steps in ("layerwise", "distill"),
            "--exact": self.exact,
        }
        if given := [option for option, is_given in of_codes.items() if is_given]:
            raise UsageError(f"{given[0]}: --bits 0 keeps a delta's leading directions alone, without codes")

    @property
    def has_budget(self) -> bool:
        """Whether settings are chosen tensor by tensor."""
        return self.size is not None or self.target_bits is not None

    @classmethod
    def with_defaults(
        cls,
        *,
        bits: float | None = None,
        code: CodeName | None = None,
        salient: int | None = None,
        rank: int | None = None,
        channel_scale: ChannelScale | None = None,
        steps: StepMethod | None = None,
        embedding_bits: float | None = None,
        embedding_rank: int | None = None,
        calibration: str | None = RANDOM,
        **others: Any,
    ) -> CompressionSettings:
        """The settings that `meswitch compress` takes: what is None follows from the others.

        Raises:
            UsageError: a value is not possible, or there is no such setting.
        """
        if unknown := sorted(set(others) - {field.name for field in fields(cls)}):
            raise UsageError(f"no such setting: {', '.join(unknown)}")
        rule = steps or DEFAULT_STEPS
        if others.get("size") is not None or others.get("target_bits") is not None:
            given = (bits, code, salient, rank, embedding_bits, embedding_rank)
            for name, value in zip(CHOSEN_BY_BUDGET, given, strict=True):
                if value is not None:
                    option = f"--{name.replace('_', '-')}"
                    raise UsageError(f"{option}: a size or target bits choose that; give either {option} or a budget")
            return cls(steps=rule, channel_scale=channel_scale or "none", calibration=calibration, **others)
        if others.get("exact"):
            if steps not in (None, "unbiased", "least-squares") or calibration not in (None, RANDOM):
                raise UsageError("--exact: its code is made when it is loaded, without calibration or training")
            rule, calibration, salient = steps or "unbiased", None, salient or 0
            bits = SERVED_BITS if bits is None else bits
            others["factor_bits"] = others.get("factor_bits") or (None if rank == 0 else SERVED_FACTOR_BITS)
            embedding_rank = embedding_rank or 0
        bits, salient = (DEFAULT_BITS if bits is None else bits), (8 if salient is None else salient)
        chosen = code or default_code(bits)
        of_use = salient or rule == "output-unbiased"
        rank = DEFAULT_RANK if rank is None else rank
        embedding_rank = default_embedding_rank(rank) if embedding_rank is None else embedding_rank
        return cls(
            bits=bits,
            salient=salient,
            rank=rank,
            channel_scale=channel_scale or default_channel_scale(bits, chosen),
            steps=rule,
            embedding_bits=embedding_bits or default_embedding_bits(bits, chosen, embedding_rank),
            embedding_rank=embedding_rank,
            code=code if chosen != default_code(bits) else None,
            calibration=calibration if calibration != RANDOM or of_use else None,
            **others,
        )

    def for_adapter(self, *, has_full_layers: bool) -> CompressionSettings:
        """Of an adapter: products are stored as they are, and calibration is for the layers that are more than that."""
        return replace(
            self,
            factor_bits=self.factor_bits or ADAPTER_FACTOR_BITS,
            calibration=self.calibration if has_full_layers else None,
            steps=self.steps if has_full_layers else "unbiased",
        )

    def for_products(self, *, has_head: bool) -> CompressionSettings:
        """Of linears without codes: calibration is for a head, which has them."""
        return self if has_head else replace(self, calibration=None, steps="unbiased")

    def for_exact(self) -> CompressionSettings:
        """Of an expert that is stored bit for bit: an engine makes its code of the weights alone."""
        rule = self.steps if self.steps == "least-squares" else "unbiased"
        return replace(self, calibration=None, steps=rule, rounding="nearest")

    def linears(self) -> QuantizerSettings:
        """Settings of the decoder's linears."""
        factor_bits = self.factor_bits or (FACTOR_BITS if self.has_budget else default_factor_bits(self.bits))
        if not self.bits:
            return QuantizerSettings(bits=0, salient=0, rank=self.rank, factor_bits=factor_bits)
        return QuantizerSettings(
            bits=self.bits,
            salient=self.salient,
            group_size=self.group_size,
            channel_scale=self.channel_scale,
            rounding=self.rounding,
            steps=self._step_rule,
            rank=self.rank,
            factor_bits=factor_bits,
            code=self.code,
        )

    @property
    def _step_rule(self) -> StepRule:
        return "unbiased" if self.steps == "distill" else self.steps

    @property
    def takes_gram(self) -> bool:
        """Whether the inputs' second moments are summed; random tokens are so few that they are kept themselves."""
        own_data = self.calibration not in (None, RANDOM)
        return self.linears().needs_gram or (self.steps == "output-unbiased" and own_data)

    def head(self) -> QuantizerSettings:
        """Settings of an untied head."""
        return self._vocabulary(
            salient=self.salient, channel_scale=self.channel_scale, rounding=self.rounding, steps=self._step_rule
        )

    def embedding(self) -> QuantizerSettings:
        """Settings of the embedding, tied or not: rows are looked up, so no channel is more salient than another."""
        return self._vocabulary(salient=0)

    def _vocabulary(self, **others: Any) -> QuantizerSettings:
        """Settings of a tensor with a row for every token. Its factors are as long as the vocabulary, and still a small
        part of its codes' bytes."""
        if self.embedding_rank or self.has_budget:
            others |= {"rank": self.embedding_rank, "factor_bits": self.factor_bits or EMBEDDING_FACTOR_BITS}
        trellis = self.linears().is_trellis and self.embedding_bits in TRELLIS_CODES
        code: CodeName = "trellis" if trellis else default_code(self.embedding_bits)
        if code == "trellis":  # a row shares one step, and rounds to nearest alone
            return QuantizerSettings(self.embedding_bits, code=code, **others | {"rounding": "nearest"})
        return QuantizerSettings(self.embedding_bits, group_size=self.group_size, code=code, **others)

    def of(self, kind: str, *, unrelated: bool = False) -> QuantizerSettings | None:
        """Settings of a kind of tensor, None for one that is stored whole; `unrelated` to what it is taken against."""
        found = self.by_kind().get(kind)
        if found and unrelated:
            return replace(found, bits=max(found.bits, UNRELATED_BITS), code=None, rank=0)
        return found

    def by_kind(self) -> dict[str, QuantizerSettings]:
        """Settings by kind of tensor; one of any other kind is stored whole."""
        return {"linear": self.linears(), "head": self.head(), "embedding": self.embedding()}

    def to_dict(self) -> dict[str, Any]:
        """As a manifest has them, without what says nothing, and without a code that the bits mean anyway."""
        silent = {name for name in _TOLD_IF_GIVEN if getattr(self, name) in (None, False)}
        silent |= set(CHOSEN_BY_BUDGET if self.has_budget else ())
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def changes_from(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from settings written earlier, as `name: then -> now`."""
        mine = self.to_dict()
        names = [field.name for field in fields(self)]
        return [f"{name}: {other.get(name)} -> {mine.get(name)}" for name in names if other.get(name) != mine.get(name)]
