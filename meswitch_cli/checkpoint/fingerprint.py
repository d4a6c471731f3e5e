"""A model's identity: a hash over its tensors, whatever the files they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from meswitch_cli.checkpoint.tensorfile import tensor_bytes

_SHOWN_DIGITS = 12


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's name, dtype, shape and bytes, as hexadecimal."""
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Combine `tensor_digest`s, by name, into the fingerprint of a model."""
    digest = hashlib.sha256()
    for name in sorted(digests):
        digest.update(f"{name}={digests[name]}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def short_fingerprint(of_model: str) -> str:
    """Enough of a fingerprint to tell models apart in a sentence; `inspect` shows all of it."""
    return of_model[: len("sha256:") + _SHOWN_DIGITS]
