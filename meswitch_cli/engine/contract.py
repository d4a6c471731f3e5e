"""What an engine is asked and what it answers. Server, chat and tests know engines by this module alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from meswitch_cli.errors import MeswitchError
from meswitch_cli.names import BASE as BASE

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "cancelled", "error"]
Residency = Literal["device", "host", "disk"]


class EngineError(MeswitchError):
    """The engine cannot do what it was asked."""


class UnknownExpertError(EngineError):
    """No expert of that name is served."""


class InvalidRequestError(EngineError):
    """A request that cannot be honoured; `parameter` names the member at fault, as the OpenAI API calls it."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class QueueFullError(EngineError):
    """More requests wait than the engine was told to hold."""


class ShuttingDownError(EngineError):
    """The engine takes no new requests."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults sample from the model's own distribution.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        logit_bias: token id to what is added to its logit, -100 to 100.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end it, beside the expert's own end-of-text ids.
        seed: with it, a request's tokens depend on nothing else in the batch.
        logprobs: None, or how many alternatives are reported beside each chosen token (0: the chosen one alone).
        prompt_logprobs: as `logprobs`, of the prompt's own tokens, each after those before it.
        json_schema: a JSON schema that the text must satisfy.
        json_object: the text must be some JSON object.
        structural_tag: a format, in xgrammar's language of structural tags, that the text must have.
        shown_tokens: special tokens whose text is part of the answer; the other ones' is not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    json_object: bool = False
    structural_tag: Mapping[str, Any] | None = None
    shown_tokens: tuple[int, ...] = ()

    @property
    def constrained(self) -> bool:
        """Whether a grammar says what may come next, and when the text ends."""
        return self.json_object or self.json_schema is not None or self.structural_tag is not None


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to generate. `expert` is a served name or `BASE`; `id` is unique among those running."""

    id: str
    expert: str
    prompt_tokens: tuple[int, ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its natural-log probability, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What is new of a request since its last chunk. The last one, and it alone, has a finish reason.

    Attributes:
        text: complete characters only; what may become a stop string is held back until it is decided.
        tokens: ids generated since the last chunk; a stop id is among them, its text is not.
        stop_reason: the stop string or id that ended it, None for an end-of-text id.
        cached_tokens: prompt tokens whose cache was shared, told with the first chunk.
        prompt_logprobs: of every prompt token but the first, where they were asked for; told with the first chunk.
        queued_seconds: from its submission to its place in a batch, told with the first chunk.
        error: what went wrong, where finish_reason is "error".
    """

    request_id: str
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    queued_seconds: float = 0.0
    error: str | None = None


#: Called in order for every chunk of a request, from the engine's thread, or from the one that cancels a request that
#: waits; must return at once.
OnChunk = Callable[[Chunk], None]


@dataclass(frozen=True)
class ExpertStatus:
    """A served expert.

    Attributes:
        digest: the artifact's: SHA-256 of its manifest, hex.
        nbytes: of the artifact's shards.
        slot: device slot, None unless resident there.
        running, waiting: its requests now.
    """

    name: str
    path: Path
    digest: str
    nbytes: int
    residency: Residency
    slot: int | None
    pinned: bool
    running: int
    waiting: int


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the start, and gauges now. Seconds are of slot loads: bytes copied over their time."""

    running: int
    waiting: int
    slots: int
    slots_used: int
    slot_hits: int
    slot_loads: int
    slot_evictions: int
    slot_load_seconds: float
    slot_load_bytes: int
    cache_blocks: int
    cache_blocks_used: int
    prompt_tokens: int
    generated_tokens: int


class Tokenizer(Protocol):
    """What a server needs of an expert's own tokenizer; transformers' tokenizers have it."""

    chat_template: str | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def get_chat_template(self, chat_template: str | None = ..., tools: Any = ...) -> str: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...


class Engine(Protocol):
    """A base and its experts, generating. All methods may be called from any thread.

    Attributes:
        max_requests: that run or wait at once; one more is refused.
    """

    base_id: str
    max_model_len: int
    max_requests: int

    @property
    def closed(self) -> str | None:
        """Why no request is taken (not started, shutting down, failed), None while requests are."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the base, once started."""

    def start(self) -> None:
        """Begin to generate; returns when requests will be taken."""

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request.

        Raises:
            UnknownExpertError, InvalidRequestError, QueueFullError, ShuttingDownError: nothing was queued.
        """

    def cancel(self, request_id: str) -> None:
        """End a request soon, with finish reason "cancelled"; unknown and finished ids are ignored."""

    def tokenizer(self, expert: str) -> Tokenizer:
        """The tokenizer of an expert or of the base. Raises UnknownExpertError."""

    def sampling_defaults(self, expert: str) -> Mapping[str, float]:
        """Members of `Sampling` that its generation_config.json sets. Raises UnknownExpertError."""

    def serves(self, expert: str) -> bool:
        """Whether requests for it are taken; they always are for the base."""

    def digest(self, expert: str) -> str:
        """SHA-256 of its artifact's manifest, hex; empty for the base. Raises UnknownExpertError."""

    def experts(self) -> tuple[ExpertStatus, ...]:
        """Those that take requests; one that is being unloaded is no longer among them."""

    def load_expert(self, name: str, path: Path) -> None:
        """Serve one more artifact, checked whole first. Raises ArtifactError, EngineError; the others serve on."""

    def unload_expert(self, name: str) -> None:
        """Take no more requests for it, let the running ones end, then free its memory. Returns when it is gone."""

    def pin_expert(self, name: str, pinned: bool = True) -> None:
        """Keep it on the device, or let it go again. Raises EngineError where every slot is pinned already."""

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        """Mean over tokens of the base's hidden state after decoder layer `layer` (1 is the first).

        Returns:
            `[prompts, hidden]` fp32 on the CPU.
        """

    def statistics(self) -> EngineStatistics: ...

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests and wait for the others; whether all had ended in `timeout` seconds."""

    def stop(self) -> None:
        """Cancel what runs, and free everything."""
