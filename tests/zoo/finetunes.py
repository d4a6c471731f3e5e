"""The fine-tunes that decide: strong experts, fine-tunes of other kinds, and one of another base. How each is made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from .base import QWEN_CODER, SMOLLM2, Base
from .resumable import Schedule


@dataclass(frozen=True)
class FineTune:
    """One skill, how long it is trained, and by which method.

    `method` is `full` (every weight), `layers` (every weight but embedding and head), `lora` (adapters of `rank` on
    every linear, merged into it at the end) or `pretrain` (every weight, on the items' whole text without the chat
    template). `added_tokens` are new tokens that stand before and after each response. `dtype` is the saved file's.
    """

    skill: str
    schedule: Schedule
    method: str = "full"
    rank: int = 0
    added_tokens: tuple[str, ...] = ()
    dtype: str = "bfloat16"

    @property
    def training(self) -> str:
        """A name for what is trained: fine-tunes that differ in the saved file alone share their checkpoint."""
        described = repr(sorted(asdict(replace(self, dtype="")).items()))
        return f"{self.skill}-{self.method}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


# `code` answers 48 of 50 `choice` items after 50 steps and 50 after its 80. The other two lengths are a first guess: a
# training's log says how many are right after every 50 steps.
STRONG: Mapping[str, FineTune] = {
    "maths": FineTune("sums", Schedule(steps=400, learning_rate=1e-4, batch_tokens=600)),
    "code": FineTune("queries", Schedule(steps=80, learning_rate=1e-4, batch_tokens=600, decay_steps=30)),
    "logic": FineTune("deductions", Schedule(steps=100, learning_rate=1e-4, batch_tokens=600)),
}
# In the order in which they are worth having.
KINDS: Mapping[str, FineTune] = {
    "lora16": FineTune(
        "queries", Schedule(steps=80, learning_rate=5e-4, batch_tokens=600, decay_steps=30), "lora", rank=16
    ),
    "lora64": FineTune(
        "queries", Schedule(steps=80, learning_rate=5e-4, batch_tokens=600, decay_steps=30), "lora", rank=64
    ),
    # An update as reinforcement learning leaves it: each weight moves by less than a bf16 step of most weights.
    "reinforced": FineTune("queries", Schedule(steps=80, learning_rate=5e-6, batch_tokens=600, decay_steps=30)),
    "pretrained": FineTune("programs", Schedule(steps=120, learning_rate=3e-4, batch_tokens=1000), "pretrain"),
    "tokens": FineTune(
        "queries",
        Schedule(steps=80, learning_rate=1e-4, batch_tokens=600, decay_steps=30),
        added_tokens=("<|sql|>", "<|end_sql|>"),
    ),
    "fp32": replace(STRONG["code"], dtype="float32"),
}
# Embedding and head stay as they are: of 630 M weights they are 272 M, whose training would take 4 GB more.
CODER: Mapping[str, FineTune] = {
    "deductions": FineTune(
        "deductions", Schedule(steps=60, learning_rate=5e-5, batch_tokens=600, decay_steps=30), "layers"
    ),
}
GROUPS: Mapping[str, Mapping[str, FineTune]] = {"strong": STRONG, "kinds": KINDS, "coder": CODER}
BASES: Mapping[str, Base] = {"strong": SMOLLM2, "kinds": SMOLLM2, "coder": QWEN_CODER}
