"""The router as a server uses it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meswitch_cli.engine.contract import BASE
from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.backend import Backend
from meswitch_cli.router.conversation import Prompt, is_binary, routing_text
from meswitch_cli.router.features import HiddenStates
from meswitch_cli.router.model import RouterModel
from meswitch_cli.router.sessions import Sessions

logger = logging.getLogger(__name__)

Reason = Literal["routed", "pinned", "sticky", "low_confidence", "out_of_domain", "empty", "error"]
#: A session leaves its expert only for one that is likelier by this much: a switch discards the session's cache.
STICKY_MARGIN = 0.2


@dataclass(frozen=True)
class RouteDecision:
    """Where a prompt goes, and why.

    Attributes:
        expert: a label of the router, or "base".
        confidence: calibrated probability of the likeliest expert; of a sticky decision, of the expert it stays with.
        probabilities: by label; empty where no model was asked.
        latency_ms: of the decision, milliseconds.
    """

    expert: str
    confidence: float
    probabilities: dict[str, float]
    reason: Reason
    latency_ms: float


class Router:
    """Decides for prompts and conversations; safe to call from any thread that its hidden states allow.

    Attributes:
        experts: label to the artifact's digest, None where it was not known in training.
        base_fingerprint: of the base whose hidden states it reads; None for the other backends.
        errors: decisions that failed and fell back.
        strict: raise instead of falling back where a decision fails.
    """

    def __init__(
        self,
        backend: Backend,
        model: RouterModel,
        *,
        fallback: str = BASE,
        experts: Mapping[str, str | None] | None = None,
        base_fingerprint: str | None = None,
        sticky_margin: float = STICKY_MARGIN,
        strict: bool = False,
    ) -> None:
        self.backend = backend
        self.model = model
        self.fallback = fallback
        self.experts = dict(experts or dict.fromkeys(model.labels))
        self.base_fingerprint = base_fingerprint
        self.strict = strict
        self.errors = 0
        self._sticky_margin = sticky_margin
        self._sessions = Sessions()

    @classmethod
    def load(
        cls,
        path: Path,
        hidden_states: HiddenStates | None = None,
        tokenizer: Any = None,
        *,
        strict: bool = False,
    ) -> Router:
        """Load a router's folder. The probe needs the base's hidden states and tokenizer, the others bring their own.

        Raises:
            RouterError: the folder is no router, damaged, of another version, or a probe is not given its base.
        """
        from meswitch_cli.router.artifact import RouterArtifact

        return RouterArtifact.open(path).router(hidden_states, tokenizer, strict=strict)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.labels

    def route(self, prompt: Prompt, *, session: str | None = None, pinned: str | None = None) -> RouteDecision:
        """Decide for a prompt, as text or as chat messages.

        A session stays with its expert until another is likelier by a margin; `pinned` is taken as it is, and
        becomes the session's expert. A failure falls back, is logged and counted.

        Raises:
            RouterError: the decision failed and the router is strict.
        """
        started = time.perf_counter()
        try:
            expert, confidence, probabilities, reason = self._decide(prompt, session, pinned)
        except Exception as error:  # whatever goes wrong here must not fail the user's request
            if self.strict:
                raise RouterError(f"the router failed: {error}") from error
            self.errors += 1
            logger.exception("the router failed; the request falls back to %s", self.fallback)
            expert, confidence, probabilities, reason = self.fallback, 0.0, {}, "error"
        return RouteDecision(expert, confidence, probabilities, reason, 1000 * (time.perf_counter() - started))

    def _decide(
        self, prompt: Prompt, session: str | None, pinned: str | None
    ) -> tuple[str, float, dict[str, float], Reason]:
        if pinned is not None:
            if session is not None:
                self._sessions.put(session, pinned)
            return pinned, 1.0, {}, "pinned"
        current = self._sessions.get(session) if session is not None else None
        text = routing_text(prompt)
        if not text:
            return (current, 0.0, {}, "sticky") if current else (self.fallback, 0.0, {}, "empty")
        if is_binary(text):
            return self.fallback, 0.0, {}, "out_of_domain"
        if self.is_cut(text):
            logger.info("a prompt of %d characters is routed by %d tokens of it", len(text), self.backend.max_tokens)
        judged = self.model.judge(self.backend.features([text]))[0]
        probabilities = judged.probabilities
        if current is not None and current != judged.label and judged.verdict != "out_of_domain":
            stays = judged.verdict == "low_confidence"
            stays |= judged.confidence - probabilities.get(current, 0.0) < self._sticky_margin
            if stays:
                return current, probabilities.get(current, 0.0), probabilities, "sticky"
        if current == judged.label and judged.verdict == "low_confidence":
            return current, judged.confidence, probabilities, "sticky"
        if judged.verdict != "routed":
            return self.fallback, judged.confidence, probabilities, judged.verdict
        if session is not None:
            self._sessions.put(session, judged.label)
        return judged.label, judged.confidence, probabilities, "routed"

    def is_cut(self, text: str) -> bool:
        """Whether a prompt is longer than what the router reads of it."""
        # No tokenizer makes more tokens than bytes, so most prompts need not be counted.
        return len(text.encode("utf-8", "replace")) > self.backend.max_tokens and (
            self.backend.count_tokens(text) > self.backend.max_tokens
        )

    def require_base(self, fingerprint: str, path: object) -> None:
        """Check that a base is the one whose hidden states the router learned from.

        Raises:
            RouterError: it is another one.
        """
        if self.base_fingerprint is not None and fingerprint != self.base_fingerprint:
            raise RouterError(
                f"the router was made for another base: {path} has fingerprint {fingerprint}, "
                f"the router {self.base_fingerprint}; train a router for this base"
            )

    def require_experts(self, served: Mapping[str, str | None]) -> None:
        """Check that a server has every expert the router can choose, in the version it was trained for.

        Args:
            served: name to the artifact's digest, None where it is not known.

        Raises:
            RouterError: an expert is missing, or its artifact is another one.
        """
        missing = [label for label in self.labels if label not in served]
        if missing:
            raise RouterError(
                f"the router can choose {', '.join(missing)}, which the server does not have (it has "
                f"{', '.join(served) or 'none'}); serve them, or remove them: meswitch router remove"
            )
        for label, artifact in self.experts.items():
            if artifact and served[label] and artifact != served[label]:
                raise RouterError(
                    f"expert {label!r}: the router was trained for the artifact with manifest {artifact[:12]}, "
                    f"the server has {str(served[label])[:12]}; train the router again"
                )
