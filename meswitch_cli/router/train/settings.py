"""How a router is trained."""

from __future__ import annotations

from dataclasses import dataclass

from meswitch_cli.errors import UsageError
from meswitch_cli.names import BASE, GATE_MODES, GateMode
from meswitch_cli.router.backends.registry import Kind
from meswitch_cli.router.decide.router import STICKY_MARGIN


@dataclass(frozen=True)
class TrainingSettings:
    """How a router is trained.

    Attributes:
        layer: of the probe; None: chosen on validation.
        max_tokens: of a prompt that the router reads.
        fallback: where prompts go that pass no gate.
        target_precision: of what is routed; sets the confidence threshold.
        gate: how much is refused where nobody says otherwise.
        excerpts: whether the folder keeps the beginnings of prompts, for explanations.
        lm_steps, lm_learning_rate: of the lm backend's fine-tuning, which ends sooner where validation stops falling.
    """

    backend: Kind = "probe"
    layer: int | None = None
    max_tokens: int = 256
    fallback: str = BASE
    target_precision: float = 0.95
    sticky_margin: float = STICKY_MARGIN
    gate: GateMode = "normal"
    excerpts: bool = True
    lm_steps: int = 240
    lm_learning_rate: float = 5e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.target_precision < 1:
            raise UsageError(f"--target-precision must be from 0.5 to below 1, not {self.target_precision}")
        if not 16 <= self.max_tokens <= 8192:
            raise UsageError(f"--max-tokens must be from 16 to 8192, not {self.max_tokens}")
        if self.gate not in GATE_MODES:
            raise UsageError(f"--gate must be one of {', '.join(GATE_MODES)}, not {self.gate!r}")
        if not 0 <= self.sticky_margin <= 1:
            raise UsageError(f"--sticky-margin must be from 0 to 1, not {self.sticky_margin}")
