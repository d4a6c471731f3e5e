"""What `meswitch compress` was asked to do, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from meswitch_cli.delta.codes import CODES, CodeName, default_code, listed
from meswitch_cli.delta.low_rank import FACTOR_WIDTHS
from meswitch_cli.delta.settings import ChannelScale, QuantizerSettings, Rounding, StepRule
from meswitch_cli.errors import UsageError

#: Code width of a delta that may be as large as the weight itself: it leaves 1 % of its energy as error, not 12 %.
UNRELATED_BITS = 4
#: Width of an adapter's factors: what adapters are trained in.
ADAPTER_FACTOR_BITS = 16
#: Calibration by random tokens.
RANDOM = "random"

StepMethod = Literal["least-squares", "unbiased", "output-unbiased", "layerwise", "distill"]


#: The step rule with the lowest KL to the full experts of those that stream, on the choice items of
#: docs/results/compression.md, with calibration data and without.
DEFAULT_STEPS: StepMethod = "output-unbiased"
#: With its low-rank part nearer to strong fine-tunes than 2 bits without one, in fewer bytes: docs/results/strong.md.
DEFAULT_BITS: float = 1


def default_channel_scale(bits: float, code: CodeName) -> ChannelScale:
    """By the same items: at 1 bit the scale lowers the mean KL of the three experts, above it does not."""
    return "rms" if bits == 1 and code == "scalar" else "none"


def default_rank(bits: float) -> int:
    """Up to 1 bit 16 directions cut KL to a tenth (docs/results/compression.md); at 2 there is less to win."""
    return 16 if bits <= 1 else 0


@dataclass(frozen=True)
class CompressionSettings:
    """Everything that decides an artifact's bytes besides the two checkpoints.

    Attributes:
        bits, salient, rank, group_size, channel_scale, rounding, code: as in `QuantizerSettings`, for the decoder's
            linears.
        steps: as there, or `distill`: unbiased steps trained end to end afterwards.
        embedding_bits: code width of embedding and head.
        calibration: SHA-256 of the calibration file, `RANDOM` for random tokens in its place, None for no statistics.
        samples, sequence_length: calibration windows and their tokens.
        factor_bits: width of an adapter's factors; None of any other fine-tune.
        exact: whether the expert is stored bit for bit; nothing is coded then.
        seed: order of the calibration items and of the batches of `distill`; the random tokens.

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
    embedding_bits: int = 2
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    code: CodeName | None = None
    factor_bits: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.steps not in get_args(StepMethod):
            raise UsageError(f"--steps must be one of {', '.join(get_args(StepMethod))}, not {self.steps!r}")
        try:
            linears = self.linears()
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.embedding_bits not in CODES:
            raise UsageError(f"--embedding-bits must be {listed(CODES)}, not {self.embedding_bits}")
        if self.factor_bits not in (None, *FACTOR_WIDTHS):
            raise UsageError(f"--factor-bits must be {listed(FACTOR_WIDTHS)}, not {self.factor_bits}")
        if self.samples < 1 or self.sequence_length < 8:
            raise UsageError("--samples must be at least 1 and --sequence-length at least 8")
        if self.calibration in (None, RANDOM) and (linears.needs_gram or self.steps == "distill"):
            wanted = "--rounding feedback" if self.rounding == "feedback" else f"--steps {self.steps}"
            raise UsageError(f"{wanted} needs calibration data: give --calibration FILE.jsonl")

    @classmethod
    def with_defaults(
        cls,
        *,
        bits: float = DEFAULT_BITS,
        code: CodeName | None = None,
        salient: int = 8,
        rank: int | None = None,
        channel_scale: ChannelScale | None = None,
        steps: StepMethod | None = None,
        embedding_bits: int | None = None,
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
        chosen = code or default_code(bits)
        of_use = salient or rule == "output-unbiased"
        return cls(
            bits=bits,
            salient=salient,
            rank=default_rank(bits) if rank is None else rank,
            channel_scale=channel_scale or default_channel_scale(bits, chosen),
            steps=rule,
            embedding_bits=embedding_bits or int(max(2, bits)),
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

    def for_exact(self) -> CompressionSettings:
        """Of an expert that is stored bit for bit: nothing is calibrated or fitted."""
        return replace(self, calibration=None, steps="unbiased", rounding="nearest")

    def linears(self) -> QuantizerSettings:
        """Settings of the decoder's linears."""
        rule: StepRule = "unbiased" if self.steps == "distill" else self.steps
        return QuantizerSettings(
            self.bits, self.salient, self.group_size, self.channel_scale, self.rounding, rule, self.rank, self.code
        )

    @property
    def takes_gram(self) -> bool:
        """Whether the inputs' second moments are summed; random tokens are so few that they are kept themselves."""
        linears = self.linears()
        return linears.needs_gram or (linears.steps == "output-unbiased" and self.calibration not in (None, RANDOM))

    def head(self) -> QuantizerSettings:
        """Settings of an untied head: without a low-rank part, which would be as wide as the vocabulary."""
        base = self.linears()
        return QuantizerSettings(
            self.embedding_bits, base.salient, base.group_size, base.channel_scale, base.rounding, base.steps
        )

    def embedding(self) -> QuantizerSettings:
        """Settings of the embedding, tied or not: rows are looked up, so no channel is more salient than another."""
        return QuantizerSettings(self.embedding_bits, 0, self.group_size, "none", "nearest", "unbiased")

    def of(self, kind: str, *, unrelated: bool = False) -> QuantizerSettings | None:
        """Settings of a kind of tensor, None for one that is stored whole; `unrelated` to what it is taken against."""
        found = self.by_kind().get(kind)
        return replace(found, bits=max(found.bits, UNRELATED_BITS), code=None) if found and unrelated else found

    def by_kind(self) -> dict[str, QuantizerSettings]:
        """Settings by kind of tensor; one of any other kind is stored whole."""
        return {"linear": self.linears(), "head": self.head(), "embedding": self.embedding()}

    def to_dict(self) -> dict[str, Any]:
        """As a manifest has them: the code is told where it is not the one that its bits mean, factors of adapters."""
        told = ("code", "factor_bits", "exact")
        return {name: value for name, value in asdict(self).items() if name not in told or value not in (None, False)}

    def changes_from(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from settings written earlier, as `name: then -> now`."""
        mine = self.to_dict()
        names = [field.name for field in fields(self)]
        return [f"{name}: {other.get(name)} -> {mine.get(name)}" for name in names if other.get(name) != mine.get(name)]
