"""Requests on an engine, and what they took: tokens a second, steps of the loop, time to the first token."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meswitch_cli.engine import TransformersEngine
from meswitch_cli.engine.contract import Chunk, GenerationRequest, Sampling
from meswitch_cli.engine.runner import Runner

_numbers = itertools.count()


@dataclass(frozen=True)
class Step:
    """One forward pass: when it began, its requests, and its tokens, prompts included."""

    began: float
    requests: int
    tokens: int


class Steps:
    """The steps of every engine in this process, from the moment that this is made."""

    def __init__(self) -> None:
        self.seen: list[Step] = []
        compute = Runner.compute_batch

        def noted(runner: Any, *arguments: Any, **named: Any) -> Any:
            batch = runner.inputs_and_outputs.requests_in_batch
            self.seen.append(Step(time.perf_counter(), len(batch), sum(item.query_length for item in batch)))
            return compute(runner, *arguments, **named)

        Runner.compute_batch = noted  # type: ignore[method-assign]

    def since(self, began: float) -> list[Step]:
        return [step for step in self.seen if step.began >= began]


class Load:
    """Requests submitted together, or one after another with `add`."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.began = time.perf_counter()
        self.ended = self.began
        self.first_token: dict[str, float] = {}
        self.gaps: dict[str, list[tuple[float, float]]] = {}
        self.tokens = 0
        self.errors: set[str] = set()
        self._submitted: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._left = threading.Semaphore(0)
        self._open = 0

    def add(self, expert: str, prompt: int, new: int) -> str:
        """Submit one greedy request of exactly `new` tokens; its id. No two prompts are alike."""
        number = next(_numbers)
        ids = tuple((31 * number + 7 * place + number * place) % 250 + 6 for place in range(prompt))
        name = f"request-{number}"
        self._submitted[name] = time.perf_counter()
        self.gaps[name] = []
        self._open += 1
        sampling = Sampling(temperature=0, max_tokens=new, ignore_eos=True)
        self.engine.submit(GenerationRequest(name, expert, ids, sampling), self._on_chunk)
        return name

    def wait(self, timeout: float = 120.0) -> Load:
        """Return when all have ended.

        Raises:
            TimeoutError: one has not.
        """
        for _ in range(self._open):
            if not self._left.acquire(timeout=timeout):
                raise TimeoutError(f"requests still run after {timeout:.0f} s; errors so far: {sorted(self.errors)}")
        self._open = 0
        self.ended = time.perf_counter()
        return self

    def cancel(self) -> None:
        """End those that still run."""
        for name in self._submitted:
            self.engine.cancel(name)
        self.wait()

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def _on_chunk(self, chunk: Chunk) -> None:
        now, name = time.perf_counter(), chunk.request_id
        if chunk.tokens:
            if name in self._last:
                self.gaps[name].append((now, now - self._last[name]))
            else:
                self.first_token[name] = now - self._submitted[name]
            self._last[name] = now
            self.tokens += len(chunk.tokens)
        if chunk.finish_reason:
            if chunk.error:
                self.errors.add(chunk.error)
            self._left.release()


def run(engine: TransformersEngine, experts: Sequence[str], requests: int, prompt: int, new: int) -> Load:
    """`requests` at once, shared out among `experts` in turn; those who fail are named in `errors`."""
    load = Load(engine)
    for index in range(requests):
        load.add(experts[index % len(experts)], prompt, new)
    return load.wait()


def measured(load: Load, steps: Steps) -> dict[str, object]:
    """A row of the table of generation. A step lasts until the next one begins; those with a prompt are apart."""
    seen = steps.since(load.began)
    lasted = [(step, after.began - step.began) for step, after in itertools.pairwise(seen)]
    decode = [seconds for step, seconds in lasted if step.tokens == step.requests]
    prefill = [(step.tokens, seconds) for step, seconds in lasted if step.tokens > step.requests]
    return {
        "tokens_per_second": load.tokens / load.seconds,
        "step_ms_p50": 1e3 * quantile(decode, 0.5),
        "step_ms_p99": 1e3 * quantile(decode, 0.99),
        "prompt_tokens_per_second": sum(tokens for tokens, _ in prefill) / max(sum(s for _, s in prefill), 1e-9),
        "first_token_ms_p50": 1e3 * quantile(load.first_token.values(), 0.5),
        "steps": len(seen),
        "errors": sorted(load.errors),
    }


def quantile(values: Any, share: float) -> float:
    """The value that `share` of the others do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
