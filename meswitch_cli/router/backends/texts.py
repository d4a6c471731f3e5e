"""Texts into models of transformers: token budgets, data types, and means over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meswitch_cli.router.decide.conversation import clip_characters, clip_tokens


class quiet_transformers:
    """Keep transformers' remarks on loading from stderr."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()


def encode(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """At most `max_tokens` ids, with the special tokens that the tokenizer puts around every text."""
    return clip_tokens(tokenizer.encode(clip_characters(text, max_tokens)), max_tokens)


def native_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it in hardware, else fp32: emulated bf16 is slower than fp32."""
    return torch.bfloat16 if _has_bf16() else torch.float32


def _has_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def mean_over_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[n, tokens, hidden]` to `[n, hidden]` fp32, padding left out."""
    weight = mask.unsqueeze(-1).float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)
