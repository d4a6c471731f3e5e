"""How fast a plan generates on a card: the least that its memory allows, and what measured constants expect."""

from __future__ import annotations

from dataclasses import dataclass

from meswitch_cli.engine.memory import MemoryPlan
from meswitch_cli.errors import UsageError
from meswitch_kernels.cards import DATA_SHEETS, CardConstants, DataSheet, measured_cards

#: Operations of one weight and one token: a multiplication and an addition.
OPERATIONS = 2


@dataclass(frozen=True)
class KnownCard:
    """A card that is known: by its data sheet, by measurement, or both.

    Attributes:
        measured: None where it never was.
    """

    name: str
    sheet: DataSheet | None
    measured: CardConstants | None

    @property
    def memory(self) -> float:
        """Bytes a second that its memory gives at most: the data sheet's, else those of a measured copy.

        Raises:
            ValueError: it has neither.
        """
        if self.sheet is not None:
            return self.sheet.memory
        if self.measured is not None:
            return self.measured.copy
        raise ValueError(f"nothing is known of {self.name}")


@dataclass(frozen=True)
class DecodeBatch:
    """A decode step: requests, on so many different experts, each with so many tokens in the cache."""

    requests: int
    experts: int
    cached: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a decode step, which gives every request a token. `expected` None: the card was never measured."""

    batch: DecodeBatch
    floor: float
    expected: float | None

    @property
    def floor_rate(self) -> float:
        """Tokens a second that nothing exceeds."""
        return self.batch.requests / self.floor

    @property
    def expected_rate(self) -> float | None:
        return self.batch.requests / self.expected if self.expected else None


def find_card(name: str) -> KnownCard:
    """The card whose name has `name` in it, or is it.

    Raises:
        UsageError: there is none, or several.
    """
    measured = measured_cards()
    names = sorted({*DATA_SHEETS, *measured})
    wanted = name.casefold()
    exact = [known for known in names if known.casefold() == wanted]
    found = exact or [known for known in names if wanted in known.casefold()]
    if len(found) != 1:
        what = f"is {len(found)} cards" if found else "is no card that is known"
        raise UsageError(f"--card {name!r} {what}; name one of {', '.join(found or names)}")
    return KnownCard(found[0], DATA_SHEETS.get(found[0]), measured.get(found[0]))


def step_time(plan: MemoryPlan, card: KnownCard, batch: DecodeBatch, bits: float) -> StepTime:
    """The time of a decode step.

    The floor reads the base's weights, the deltas of the batch's experts and its keys and values once each, at the
    speed of the card's memory. The expectation reads each at the speed that was measured for it, and adds what every
    layer and every step took beside that.
    """
    deltas = batch.experts * plan.slot_read_nbytes
    cache = batch.requests * batch.cached * plan.token_nbytes
    floor = (plan.base_read_nbytes + deltas + cache) / card.memory
    if card.sheet is not None:
        floor = max(floor, OPERATIONS * plan.multiplied * batch.requests / card.sheet.matrix)
    known = card.measured
    if known is None or (batch.experts and str(bits) not in known.experts):
        return StepTime(batch, floor, None)
    expected = plan.base_read_nbytes / known.base + cache / known.copy
    expected += deltas / known.experts[str(bits)] if batch.experts else 0.0
    expected += plan.layers * known.layer_seconds + known.step_seconds
    return StepTime(batch, floor, max(expected, floor))


def prompt_rates(plan: MemoryPlan, card: KnownCard) -> tuple[float | None, float | None]:
    """Tokens of prompts read in a second: the most by the data sheet, and as expected of a measured card."""
    work = OPERATIONS * plan.multiplied
    return (
        card.sheet.matrix / work if card.sheet else None,
        card.measured.prompt_operations / work if card.measured else None,
    )


def load_seconds(plan: MemoryPlan, card: KnownCard) -> float | None:
    """Seconds until an expert is in its slot that waits in host memory; None where loads were never measured."""
    return plan.slot_nbytes / card.measured.load if card.measured and card.measured.load else None
