"""Requests of families that the paged cache does not take: each goes through transformers' own forward pass by itself,
with a cache of its own, a token at a time in turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch

from meswitch_cli.engine.base_model import BaseModel
from meswitch_cli.engine.batch import OneSlotBatch
from meswitch_cli.engine.decoding import Decoding
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.loop import Hooks
from meswitch_cli.engine.memory import CPU_CACHE_BYTES, GPU_CACHE_SHARE
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.own_parameters import BASE_SLOT
from meswitch_cli.engine.prompt_scores import ScoredRun, keep_scores
from meswitch_cli.engine.sampler import Sampler, choose
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.model.device import available_bytes

logger = logging.getLogger(__name__)

#: How often a loop without requests looks whether somebody has waited too long for a slot, in seconds.
PATIENCE = 0.1
#: Tokens of a made-up request, whose cache tells what a token takes.
_PROBE_TOKENS = 16


@dataclass
class _Running:
    generation: Generation
    decoding: Decoding | None = None

    @property
    def tokens(self) -> int:
        """The most that its cache holds."""
        request = self.generation.request
        return len(request.prompt_tokens) + request.sampling.max_tokens


class OneByOne:
    """The loop and its thread: `loop.Loop` and `loop.LoopThread`.

    Attributes:
        cache_tokens: the most that the caches of running requests hold together; one request runs in any case.
        tokens_reserved: those that they may come to hold, for any thread to read.
    """

    def __init__(self, base: BaseModel, settings: EngineSettings, slots: int, max_model_len: int, hooks: Hooks) -> None:
        self._base, self._slots, self._hooks, self._longest = base, slots, hooks, max_model_len
        self._backend = kernels(base.device, base.dtype)
        self._most = settings.max_running
        self._waiting: deque[Generation] = deque()
        self._running: list[_Running] = []
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="meswitch-one-by-one", daemon=True)
        self.cache_tokens = settings.cache_tokens or self._affordable()
        self.tokens_reserved = 0

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        self._wake.set()

    def cache_use(self) -> tuple[int, int]:
        """Tokens: requests have caches of their own, without blocks."""
        return self.cache_tokens, self.tokens_reserved

    def admit(self, generation: Generation) -> None:
        self._waiting.append(generation)

    def cancel(self, request_id: str) -> None:
        self._waiting = deque(item for item in self._waiting if item.id != request_id)
        self._running = [item for item in self._running if item.generation.id != request_id]

    def banks_moved(self) -> None:
        """Nothing: each step looks where they are."""

    def forget_prefixes(self) -> None:
        """Nothing: a request's cache ends with it."""

    def turn(self) -> bool:
        """Compute a token of every request that runs; return whether any is left."""
        self._hooks.before_batch(self)
        while self._waiting and len(self._running) < self._most:
            item = _Running(self._waiting[0])
            if self._running and self._reserved() + item.tokens > self.cache_tokens:
                break
            self._running.append(item)
            self._waiting.popleft()
        self.tokens_reserved = self._reserved()
        for item in sorted(self._running, key=lambda item: item.generation.slot):
            try:
                self._step(item)
            except Exception as error:  # of this request alone: the others have caches of their own
                logger.debug("request %s", item.generation.id, exc_info=True)
                self._running.remove(item)
                self._hooks.on_failure(item.generation, error)
                continue
            if item.generation.finished:
                self._running.remove(item)
                self._hooks.on_end(item.generation)
        self.tokens_reserved = self._reserved()
        return bool(self._running or self._waiting)

    def _step(self, item: _Running) -> None:
        """Have a request's next token computed, chosen and told."""
        generation = item.generation
        request = generation.request
        scored = item.decoding is None and request.sampling.prompt_logprobs is not None
        with self._of_slot(generation.slot):
            item.decoding = item.decoding or Decoding(self._base.model, request.prompt_tokens, item.tokens)
            logits = item.decoding.forward(every=scored)
        if scored:
            targets = request.prompt_tokens[1:]
            keep_scores([ScoredRun(generation, 0, targets)], logits[: len(targets)])
        row = logits[-1:].to(torch.float32, copy=True)
        (choice,) = choose(row, [cast(Sampler, generation.sampler)])
        if choice.token is None:
            generation.end("error", "the model gave no token a finite score")
        elif not generation.accept(choice.token, choice.logprob):
            item.decoding.push(choice.token)

    @contextmanager
    def _of_slot(self, slot: int) -> Iterator[None]:
        """Have the model be what is in a slot, in this thread."""
        own, current = self._base.own_parameters, self._base.current
        with nullcontext() if own is None else own.placed(slot):
            if slot != BASE_SLOT:
                current.batch = OneSlotBatch(slot, self._slots, self._backend, self._base.device)
            try:
                yield
            finally:
                current.batch = None

    def _reserved(self) -> int:
        return sum(item.tokens for item in self._running)

    @torch.inference_mode()
    def _affordable(self) -> int:
        """Tokens whose cache there is room for, by what a made-up request's takes."""
        probe = Decoding(self._base.model, [0] * _PROBE_TOKENS, self._longest)
        with self._of_slot(BASE_SLOT):
            probe.forward()
        device = self._base.device
        room = CPU_CACHE_BYTES if device.type == "cpu" else int(available_bytes(device) * GPU_CACHE_SHARE)
        return max(self._longest, room * _PROBE_TOKENS // max(probe.nbytes, 1))

    def _run(self) -> None:
        problem: BaseException | None = None
        try:
            if self._base.device.type == "cuda":
                torch.cuda.set_device(self._base.device)
            with torch.inference_mode():
                while not self._stopped:
                    self._wake.clear()
                    if not self.turn():
                        self._wake.wait(PATIENCE)
        except BaseException as error:
            logger.exception("the loop has ended")
            problem = error
        self._hooks.on_stop(problem)
