"""Texts that must be JSON, inside vLLM's worker.

vLLM's own structured output knows one tokenizer, the base's. Experts have their own, so our grammars are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from meswitch_cli.engine.contract import Sampling
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.grammar import Grammar, Grammars
from meswitch_cli.engine.vllm.sampling import GRAMMAR_KEY
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.tokenizer import load_tokenizer


class _Constraint:
    """A request's grammar, and how far into its tokens it has come."""

    def __init__(self, grammar: Grammar, tokens: list[int]) -> None:
        self._grammar, self._tokens, self._taken = grammar, tokens, 0

    def mask(self, logits: torch.Tensor) -> None:
        for token in self._tokens[self._taken :]:
            self._grammar.take(token)
        self._taken = len(self._tokens)
        if not self._grammar.complete:
            self._grammar.mask(logits)


class GrammarProcessor(LogitsProcessor):  # type: ignore[misc]
    """Masks the rows of the requests that ask for JSON."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._grammars = Grammars()
        self._models: dict[str, ServedModel] = {}
        self._constraints: dict[int, _Constraint] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests from row to row; vLLM says to heed removals, then additions, then moves."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._constraints.pop(row, None)
        for row, params, _, tokens in batch_update.added:
            self._constraints.pop(row, None)
            asked = (params.extra_args or {}).get(GRAMMAR_KEY)
            if asked is not None:
                self._constraints[row] = _Constraint(self._grammar(asked), tokens)
        for source, target, direction in batch_update.moved:
            moving, other = self._constraints.pop(source, None), self._constraints.pop(target, None)
            if moving is not None:
                self._constraints[target] = moving
            if other is not None and direction == MoveDirectionality.SWAP:
                self._constraints[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, constraint in self._constraints.items():
            constraint.mask(logits[row])
        return logits

    def _grammar(self, asked: Mapping[str, Any]) -> Grammar:
        digest = asked["digest"]
        if digest not in self._models:
            path = Path(asked["path"])
            self._models[digest] = ServedModel(
                name="",
                path=path,
                digest=digest,
                tokenizer=load_tokenizer(path, ArtifactError),
                vocabulary=asked["vocabulary"],
                end_ids=frozenset(asked["end_ids"]),
            )
        formats = {
            name: json.loads(text)
            for name, text in (("json_schema", asked["schema"]), ("structural_tag", asked["structural_tag"]))
            if text is not None
        }
        sampling = Sampling(**formats or {"json_object": True})
        grammar = self._grammars.grammar(sampling, self._models[digest])
        assert grammar is not None
        return grammar
