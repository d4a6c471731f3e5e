"""Texts that must be JSON, or hold calls of tools, by xgrammar: which tokens may come next."""

from __future__ import annotations

import json
import re
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meswitch_cli.engine.contract import EngineError, InvalidRequestError, Sampling
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.schema import unenforced

#: Compiled grammars kept for each expert, in bytes.
CACHE_BYTES = 64 << 20

#: How xgrammar begins a message: the time, and a place in its own source.
_SOURCE_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")


class ControlTokens(NamedTuple):
    """Tokens whose bytes hold control characters beyond line ends, and the token that is a line end.

    JSON forbids both inside strings, and xgrammar 0.2.8 lets the former pass where a schema limits a string's length.
    """

    ids: Tensor
    line_end: int | None


class Grammar:
    """Where one request is in its grammar."""

    def __init__(self, matcher: Any, bitmask: Tensor, controls: ControlTokens) -> None:
        """`bitmask` int32 `[1, vocabulary / 32]` is for the matcher to fill."""
        self._matcher, self._bitmask, self._controls = matcher, bitmask, controls

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_terminated())

    def allows_anything(self, vocabulary: int) -> bool:
        """Whether some token may come next."""
        logits = torch.zeros(vocabulary)
        self.mask(logits)
        return bool((logits == 0).any())

    def take(self, token: int) -> None:
        if not self.complete:
            self._matcher.accept_token(token)

    def mask(self, logits: Tensor) -> None:
        """Set, in place, the logits `[width]` of tokens that the grammar forbids to -inf."""
        self._matcher.fill_next_token_bitmask(self._bitmask)
        words = self._bitmask.to(logits.device)[0]
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((words[:, None] >> shifts) & 1).bool().flatten()[: logits.shape[0]]
        logits[: allowed.shape[0]].masked_fill_(~allowed, -torch.inf)
        logits[allowed.shape[0] :] = -torch.inf
        if not self._free:
            logits[self._controls.ids.to(logits.device)] = -torch.inf

    @property
    def _free(self) -> bool:
        """Whether the place is one where JSON's rules do not hold: a line may end there."""
        token = self._controls.line_end
        return token is not None and bool((self._bitmask[0, token // 32] >> (token % 32)) & 1)


class Grammars:
    """Compiles grammars, once for each expert and schema."""

    def __init__(self) -> None:
        self._compilers: dict[str, tuple[Any, ControlTokens]] = {}
        self._lock = threading.Lock()

    def grammar(self, sampling: Sampling, model: ServedModel) -> Grammar | None:
        """The grammar that a request asks for.

        Raises:
            InvalidRequestError: it is not a schema that can be honoured.
            EngineError: xgrammar is not installed.
        """
        if not sampling.constrained:
            return None
        try:
            import xgrammar
        except ImportError as error:
            raise EngineError("JSON output needs xgrammar: pip install 'meswitch[serve]'") from error
        if keyword := unenforced(sampling.json_schema):
            message = f"response_format: the schema's {keyword} cannot be enforced; leave it out, or say it otherwise"
            raise InvalidRequestError(message, "response_format")
        compiler, controls = self._compiler(model, xgrammar)
        try:
            if sampling.structural_tag is not None:
                compiled = compiler.compile_structural_tag(json.dumps(dict(sampling.structural_tag)))
            else:
                schema = {"type": "object"} if sampling.json_schema is None else dict(sampling.json_schema)
                # One way to write each value: a model may otherwise write line ends until its tokens are used up.
                compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = _SOURCE_PLACE.sub("", str(error).strip().splitlines()[-1])
            parameter = "response_format" if sampling.structural_tag is None else "tools"
            message = f"{parameter}: the schema cannot be honoured: {reason}"
            raise InvalidRequestError(message, parameter) from error
        bitmask = xgrammar.allocate_token_bitmask(1, model.vocabulary)
        grammar = Grammar(xgrammar.GrammarMatcher(compiled), bitmask, controls)
        if not grammar.allows_anything(model.vocabulary):
            parameter = "response_format" if sampling.structural_tag is None else "tools"
            raise InvalidRequestError(f"{parameter}: no text satisfies the schema", parameter)
        return grammar

    def forget(self, model: ServedModel) -> None:
        with self._lock:
            self._compilers.pop(model.digest, None)

    def _compiler(self, model: ServedModel, xgrammar: Any) -> tuple[Any, ControlTokens]:
        with self._lock:
            if model.digest not in self._compilers:
                info = xgrammar.TokenizerInfo.from_huggingface(
                    model.tokenizer, vocab_size=model.vocabulary, stop_token_ids=sorted(model.end_ids) or None
                )
                compiler = xgrammar.GrammarCompiler(info, cache_limit_bytes=CACHE_BYTES)
                self._compilers[model.digest] = (compiler, _control_tokens(info.decoded_vocab))
            return self._compilers[model.digest]


def _control_tokens(vocabulary: list[bytes]) -> ControlTokens:
    allowed = b"\n\r"
    ids = [i for i, text in enumerate(vocabulary) if any(byte < 0x20 and byte not in allowed for byte in text)]
    line_end = vocabulary.index(b"\n") if b"\n" in vocabulary else None
    return ControlTokens(torch.tensor(ids, dtype=torch.long), line_end)
