"""The router as a server uses it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.names import BASE, GateMode
from meswitch_cli.router.decide.backend import FeatureSource
from meswitch_cli.router.decide.conversation import (
    Prompt,
    cached_characters,
    has_open_tool_call,
    is_binary,
    routing_texts,
)
from meswitch_cli.router.decide.explanation import Explanation, explain
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.decide.sessions import Sessions

logger = logging.getLogger(__name__)

#: The last three are no router's: a server gives them where the request names an expert, where the router fails, and
#: where the expert that it chose is not served.
Reason = Literal["routed", "sticky", "low_confidence", "out_of_domain", "empty", "pinned", "error", "unavailable"]
#: A session leaves its expert only for one that is likelier by this much: a switch discards the session's cache.
STICKY_MARGIN = 0.2
#: After a long conversation, of this many characters or more (about 4,000 tokens to be read again), it is this many
#: times as much.
FULL_PRICE_CHARACTERS, LARGEST_PRICE = 16_000, 3.0


@dataclass(frozen=True)
class RouteDecision:
    """Where a prompt goes, and why.

    Attributes:
        expert: a label of the router, or "base".
        confidence: calibrated probability of the likeliest expert; of a sticky decision, of the expert it stays with.
        probabilities: by label; empty where no model was asked.
        latency_ms: milliseconds that the decision took, without any wait for its turn.
    """

    expert: str
    confidence: float
    probabilities: dict[str, float]
    reason: Reason
    latency_ms: float


class Router:
    """Decides for prompts and conversations; safe to call from any thread that its hidden states allow.

    Attributes:
        fallback: where prompts go that pass no gate. A decision that fails goes nowhere: it is raised, and who asked
            decides.
        gate: how much is refused where a call does not say.
    """

    def __init__(
        self,
        backend: FeatureSource,
        model: RouterModel,
        *,
        fallback: str = BASE,
        sticky_margin: float = STICKY_MARGIN,
        gate: GateMode = "normal",
    ) -> None:
        self.backend = backend
        self.model = model
        self.fallback = fallback
        self.gate: GateMode = gate
        self._sticky_margin = sticky_margin
        self._sessions = Sessions()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.labels

    def route(self, prompt: Prompt, *, session: str | None = None, gate: GateMode | None = None) -> RouteDecision:
        """Decide for a prompt, as text or as chat messages; a session stays until another is likelier by a margin.

        Args:
            gate: how much is refused, this time.

        Raises:
            RouterError: the decision failed.
        """
        started = time.perf_counter()
        try:
            expert, confidence, probabilities, reason = self._decide(prompt, session, gate or self.gate)
        except Exception as error:  # a backend may fail in any way, and who asks is to know it as one
            raise RouterError(f"the router failed: {error}") from error
        return RouteDecision(expert, confidence, probabilities, reason, 1000 * (time.perf_counter() - started))

    def explain(self, prompt: Prompt, count: int = 5) -> Explanation | None:
        """The figures of a decision and the `count` known prompts nearest to it; None where there is no text to read.

        Raises:
            RouterError: the prompt cannot be read.
        """
        texts = routing_texts(prompt)
        if not texts or is_binary(texts[-1]):
            return None
        try:
            return explain(self.model, self._deciding(texts), count)
        except Exception as error:  # as for a decision
            raise RouterError(f"the router failed: {error}") from error

    def keep(self, session: str, expert: str) -> None:
        """Make an expert, of this router or not, the one that a session is with."""
        self._sessions.put(session, expert)

    def _decide(
        self, prompt: Prompt, session: str | None, gate: GateMode
    ) -> tuple[str, float, dict[str, float], Reason]:
        current = self._sessions.get(session) if session is not None else None
        if current is not None and has_open_tool_call(prompt):
            return current, 0.0, {}, "sticky"
        texts = routing_texts(prompt)
        if not texts:
            return (current, 0.0, {}, "sticky") if current else (self.fallback, 0.0, {}, "empty")
        if is_binary(texts[-1]):
            return self.fallback, 0.0, {}, "out_of_domain"
        if self.is_cut(texts[0]):
            length = len(texts[0])
            logger.info("a prompt of %d characters is routed by %d tokens of it", length, self.backend.max_tokens)
        judged = self.model.judge(self._deciding(texts), gate)[0]
        probabilities = judged.probabilities
        if current is not None and current != judged.label and judged.verdict != "out_of_domain":
            stays = judged.verdict == "low_confidence"
            stays |= judged.confidence - probabilities.get(current, 0.0) < self._price(prompt)
            if stays:
                return current, probabilities.get(current, 0.0), probabilities, "sticky"
        if current == judged.label and judged.verdict == "low_confidence":
            return current, judged.confidence, probabilities, "sticky"
        if judged.verdict != "routed":
            return self.fallback, judged.confidence, probabilities, judged.verdict
        if session is not None:
            self._sessions.put(session, judged.label)
        return judged.label, judged.confidence, probabilities, "routed"

    def _deciding(self, texts: Sequence[str]) -> torch.Tensor:
        """Features `[1, d]` of the text that decides: the newest turn alone where it passes the strict gate by itself,
        as a new subject does, else that turn after what was said before."""
        features = self.backend.features(list(texts))
        if len(texts) > 1 and self.model.judge(features[:1], "strict")[0].verdict == "routed":
            return features[:1]
        return features[-1:]

    def _price(self, prompt: Prompt) -> float:
        """The lead in probability for which a session leaves its expert; it grows with the cache that is lost."""
        lost = cached_characters(prompt) / FULL_PRICE_CHARACTERS
        return self._sticky_margin * (1 + (LARGEST_PRICE - 1) * min(1.0, lost))

    def is_cut(self, text: str) -> bool:
        """Whether a prompt is longer than what the router reads of it."""
        # No tokenizer makes more tokens than bytes, so most prompts need not be counted.
        return len(text.encode("utf-8", "replace")) > self.backend.max_tokens and (
            self.backend.count_tokens(text) > self.backend.max_tokens
        )
