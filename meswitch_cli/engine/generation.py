"""One request while it is served: what it has generated, and what it has told."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from meswitch_cli.engine.contract import Chunk, FinishReason, GenerationRequest, OnChunk, TokenLogprob
from meswitch_cli.engine.detokenizer import Detokenizer, StopStrings
from meswitch_cli.engine.expert import ServedModel

logger = logging.getLogger(__name__)


class Continuation(Protocol):
    """What has been chosen so far; our `Sampler` is one."""

    generated: list[int]

    @property
    def complete(self) -> bool:
        """Whether nothing more is allowed to follow."""

    def take(self, token: int) -> None:
        """Remember a chosen token."""


class Generation:
    """Turns a request's tokens into chunks and decides when it ends. Used by the engine's thread alone.

    Attributes:
        slot: the device slot of its expert while it runs, -1 for the base.
        prompt_logprobs: of the prompt's tokens but the first, as far as they are computed.
    """

    def __init__(
        self,
        request: GenerationRequest,
        model: ServedModel,
        sampler: Continuation,
        on_chunk: OnChunk,
        before_last: Callable[[Generation], None] = lambda generation: None,
    ) -> None:
        """`before_last` is called before the last chunk is told."""
        self.request, self.model, self.sampler = request, model, sampler
        self.slot = -1
        self.prompt_logprobs: list[TokenLogprob] = []
        self.cached_tokens = 0
        self.since = time.monotonic()
        self.queued_seconds = 0.0
        self.finished = False
        self._on_chunk, self._before_last = on_chunk, before_last
        self._detokenizer = Detokenizer(model.tokenizer, request.prompt_tokens)
        self._stops = StopStrings(request.sampling.stop)
        self._first = True
        self._untold: tuple[int, TokenLogprob | None] | None = None

    @property
    def id(self) -> str:
        return self.request.id

    def accept(self, token: int, logprob: TokenLogprob | None, later: bool = False) -> bool:
        """Take the next token, tell what it completes; return whether the request is over.

        `later`, a token that does not end the request may wait for `tell`: where no text is looked for in the answer,
        the token alone says whether it does.
        """
        self.tell()
        if self.finished:
            return True
        self.sampler.take(token)
        if later and not self._stops and self._goes_on(token):
            self._untold = (token, logprob)
            return False
        return self._told(token, logprob)

    def tell(self) -> None:
        """Tell what has waited."""
        untold, self._untold = self._untold, None
        if untold is not None and not self.finished:
            self._told(*untold)

    def _goes_on(self, token: int) -> bool:
        """Whether a token does not end the request, its text apart."""
        sampling = self.request.sampling
        ends = token in sampling.stop_token_ids or (token in self.model.end_ids and not sampling.ignore_eos)
        return not (ends or self.sampler.complete or len(self.sampler.generated) >= sampling.max_tokens)

    def _told(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Tell what the last token completes; return whether the request is over."""
        sampling, count = self.request.sampling, len(self.sampler.generated)
        logprobs = () if logprob is None else (logprob,)
        ended: FinishReason | None = None
        stop_reason: str | int | None = None
        text = ""
        if token in sampling.stop_token_ids:
            ended, stop_reason = "stop", token
        else:
            if token in self.model.end_ids and not sampling.ignore_eos:
                ended = "stop"
            elif token in sampling.shown_tokens:
                text = self._detokenizer.push_shown(token)
            else:
                text = self._detokenizer.push(token)
            if count >= sampling.min_tokens:
                special = self._detokenizer.left_out(token) if self._stops and not text else ""
                text = self._push_special(special) if special else self._stops.push(text)
            if self._stops.found is not None:
                ended, stop_reason = "stop", self._stops.found
        if ended is None and self.sampler.complete:
            ended = "stop"
        if ended is None and count >= sampling.max_tokens:
            ended = "length"
        if ended and stop_reason is None:
            text += self._rest()
            if self._stops.found is not None:
                ended, stop_reason = "stop", self._stops.found
        elif ended and isinstance(stop_reason, int):
            text += self._rest()
        self._tell(Chunk(self.id, text, (token,), logprobs, ended, stop_reason))
        self.finished = self.finished or ended is not None
        return self.finished

    def _push_special(self, special: str) -> str:
        """As `StopStrings.push` of a special token's text. An incomplete character stands before it, and is complete as
        U+FFFD where the text ends with the special token; where it does not, tokens that follow may complete it."""
        stops = copy.deepcopy(self._stops)
        text = stops.push(self._detokenizer.pending(), special)
        if stops.found is None:
            return self._stops.push("", special)
        self._detokenizer.flush()
        self._stops = stops
        return text

    def _rest(self) -> str:
        """Text held back, now that nothing follows."""
        tail = self._detokenizer.flush()
        return (self._stops.push(tail) if tail else "") + self._stops.flush()

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """End it before its time."""
        self.tell()
        if not self.finished:
            self.finished = True
            self._tell(Chunk(self.id, self._rest() if reason == "length" else "", finish_reason=reason, error=error))

    def _tell(self, chunk: Chunk) -> None:
        if self._first:
            chunk = replace(
                chunk,
                cached_tokens=self.cached_tokens,
                queued_seconds=self.queued_seconds,
                prompt_logprobs=tuple(self.prompt_logprobs),
            )
            self._first = False
        if chunk.finish_reason is not None:
            self._before_last(self)
        try:
            self._on_chunk(chunk)
        except Exception:  # a caller's mistake must not stop the others
            logger.exception("request %s: its on_chunk raised; the request is ended", self.id)
            self.finished = True
