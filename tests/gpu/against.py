"""Parts: what serves a family otherwise, on the same engine: the base alone, LoRA adapters, one dense model each."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpu.engine import decode, started
from gpu.figures import say
from gpu.load import Load, Steps, measured
from gpu.model import Model, nbytes, parser
from meswitch_cli.engine import TransformersEngine, transformers_engine
from meswitch_cli.engine.contract import BASE
from meswitch_kernels.bank import BankTensors
from meswitch_kernels.dispatch import backend_module, default_backend


class LoraLinear:
    """y = x·Wᵀ + (x·Rᵀ)·Lᵀ, each token with the factors of its own slot.

    The factors of all slots are stacked and multiplied at once; the products with other slots' are set to zero
    between. Of the deltas nothing else is read. The engine, its banks, batches and attention are as ever.
    """

    def __init__(self) -> None:
        self._left: dict[int, Tensor] = {}
        self._slots: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bank: BankTensors,
        slot_of_token: Tensor,
        groups: Any = None,
    ) -> Tensor:
        y = linear(x, weight, bias)
        slots, rank, _ = bank.right.shape
        if not rank:
            return y
        number = self._slots.setdefault((slots, x.device), torch.arange(slots, device=x.device))
        left = self._left.get(bank.left.data_ptr())
        if left is None:
            left = bank.left.transpose(1, 2).flatten(0, 1).contiguous()
            self._left[bank.left.data_ptr()] = left
        z = linear(x, bank.right.flatten(0, 1)).view(-1, slots, rank)
        own = z * (slot_of_token[:, None] == number).unsqueeze(-1)
        return torch.addmm(y, own.flatten(1), left)


def base_alone(model: Model, steps: Steps) -> None:
    engine = started(model, "base alone", {})
    sizes = model.sizes
    try:
        with model.measuring():
            for requests in dict.fromkeys((min(sizes.requests[-1], sizes.experts), *sizes.requests)):
                decode(engine, model, steps, "the base alone", [BASE], requests)
    finally:
        engine.stop()


def lora(model: Model, steps: Steps) -> None:
    """Experts of 1 bit and rank 16 of which the low-rank part alone is multiplied."""
    transformers_engine.why_one_by_one = lambda *_, **__: None  # type: ignore[assignment]  # it would miss the codes, rightly
    backend = backend_module(default_backend(model.device))
    product = LoraLinear()
    backend.expert_linear = product  # type: ignore[attr-defined]
    backend.expert_linears = lambda x, operands, *batch: [product(x, *own, *batch) for own in operands]  # type: ignore[attr-defined]
    experts = model.experts("1", model.sizes.experts)
    engine = started(model, "LoRA", experts)
    sizes, names = model.sizes, list(experts)
    some = min(sizes.requests[-1], sizes.experts)
    try:
        with model.measuring():
            for group, requests in ((names, some), (names[:1], sizes.requests[0]), (names, sizes.requests[-1])):
                decode(engine, model, steps, "LoRA of rank 16", group, requests)
        layers = engine._base.linears.values()
        ranks = {rank for layer in layers if layer.bank is not None for rank in layer.bank.tensors.slot_rank.tolist()}
        if ranks != {16}:
            raise SystemExit(f"the experts' low-rank parts are of rank {sorted(ranks)}, not 16")
    finally:
        engine.stop()


def dense(model: Model, steps: Steps) -> None:
    """Full models side by side in one process, each with its own engine."""
    model.write()
    sizes = model.sizes
    tokens = 2 * (sizes.prompt + sizes.new + 64) * sizes.requests[-1] // sizes.dense
    engines = [
        started(model, "one dense model", {}, base=model.expert, cache_tokens=tokens) for _ in range(sizes.dense)
    ]
    try:
        with model.measuring():
            in_turn_and_at_once(engines, model, steps)
    finally:
        for engine in engines:
            engine.stop()


def in_turn_and_at_once(engines: list[TransformersEngine], model: Model, steps: Steps) -> None:
    """One request of each model, first one after another, then together."""
    sizes = model.sizes
    decode(engines[0], model, steps, "one dense model", [BASE], 1)
    for what, together in (("dense models in turn", False), ("dense models at once", True)):
        loads = []
        began = time.perf_counter()
        for engine in engines:
            load = Load(engine)
            load.add(BASE, sizes.prompt, sizes.new)
            loads.append(load if together else load.wait())
        for load in loads if together else ():
            load.wait()
        seconds = time.perf_counter() - began
        row = measured(loads[0], steps) if not together else {}
        say(
            "dense",
            what=what,
            models=len(engines),
            requests=len(loads),
            tokens_per_second=sum(load.tokens for load in loads) / seconds,
            step_ms_p50=row.get("step_ms_p50"),
            gigabytes_a_model=nbytes(model.expert) / 1e9,
            gigabytes_of_all_experts=sizes.experts * nbytes(model.expert) / 1e9,
            errors=sorted(set().union(*(load.errors for load in loads))),
        )


def main() -> None:
    arguments = parser()
    parts = {"base": base_alone, "lora": lora, "dense": dense}
    arguments.add_argument("which", choices=parts)
    options = arguments.parse_args()
    model = Model(options.scratch, options.tiny)
    model.write()
    parts[options.which](model, Steps())


if __name__ == "__main__":
    sys.exit(main())
