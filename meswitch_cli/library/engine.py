"""Generation in a program: one base in memory, its experts beside it, prompts for any of them in one batch."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.engine.contract import Chunk, EngineError, ExpertStatus, GenerationRequest, Sampling
from meswitch_cli.engine.generate import Completion, generate
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.transformers_engine import TransformersEngine
from meswitch_cli.errors import UsageError
from meswitch_cli.hub.fetch import find_artifact
from meswitch_cli.names import BASE

#: Tokens of an answer where nobody says how many.
MAX_TOKENS = 256
Messages = Sequence[Mapping[str, Any]]


def artifact_folder(artifact: Artifact | str | Path) -> Path:
    """The folder of an artifact that is opened already, or named."""
    return artifact.path if isinstance(artifact, Artifact) else find_artifact(artifact)


class LocalEngine:
    """A base and its experts, generating in this process; a context manager that stops in the end.

    `with Engine("llama", {"maths": "ann/llama-maths-1bit"}) as engine: engine.generate("12 * 12 =", expert="maths")`
    """

    def __init__(
        self, base: str | Path, experts: Mapping[str, Artifact | str | Path] | None = None, **settings: Any
    ) -> None:
        """Load the base, check every artifact, and begin.

        Args:
            base: checkpoint folder or Hub id.
            experts: artifacts (folders, Hub ids or opened ones) by the name under which each is asked for.
            settings: of `EngineSettings`, by name: `slots=4`, `device="cpu"`, `max_model_len=4096`; those left out
                have the defaults of `meswitch serve`.

        Raises:
            UsageError: a name or a setting is impossible.
            ArtifactError: an artifact is damaged, or of another base.
            EngineError: an expert cannot be served, or this machine cannot compute the base's family rightly.
        """
        folders = {name: artifact_folder(artifact) for name, artifact in (experts or {}).items()}
        try:
            chosen = EngineSettings(base=str(base), experts=folders, **({"strict": True} | settings))
        except TypeError as error:
            raise UsageError(f"no such setting: {error}") from error
        self._engine = TransformersEngine(chosen)
        self._ids = (f"call-{number}" for number in itertools.count())
        try:
            self._engine.start()
        except BaseException:
            self._engine.stop()
            raise

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()

    @overload
    def generate(
        self, prompts: str, *, expert: str | Sequence[str] = ..., max_tokens: int | None = ..., **sampling: Any
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        expert: str | Sequence[str] = ...,
        max_tokens: int | None = ...,
        **sampling: Any,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        expert: str | Sequence[str] = BASE,
        max_tokens: int | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Continue texts, all in one batch.

        Args:
            prompts: a text, or several; the result is one completion, or a list in their order.
            expert: who continues them, a served name or `base`; or one name for each prompt.
            max_tokens: of each continuation; None is 256, or what the context leaves.
            sampling: of `Sampling`, by name: `temperature=0`, `top_p=0.9`, `stop=("\\n",)`, `seed=1`, `logprobs=5`.
                What is left out, or None, is what the model's own generation_config.json sets, as it is for a server.

        Raises:
            EngineError: no such expert, or a request that cannot be honoured.
            UsageError: as many names as prompts are needed, or there is no such sampling parameter.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        names = [expert] * len(texts) if isinstance(expert, str) else list(expert)
        if len(names) != len(texts):
            raise UsageError(f"expert: {len(names)} names for {len(texts)} prompts; give one name, or one for each")
        requests = [
            self._request(name, self._tokens(name, text), max_tokens, sampling)
            for name, text in zip(names, texts, strict=True)
        ]
        done = generate(self._engine, requests)
        for completion in done:
            if completion.finish_reason == "error":
                raise EngineError(completion.error or "a request failed")
        return done[0] if isinstance(prompts, str) else done

    def chat(
        self, messages: str | Messages, *, expert: str = BASE, max_tokens: int | None = None, **sampling: Any
    ) -> Completion:
        """Answer a conversation, rendered by the expert's own chat template.

        Args:
            messages: `{"role": ..., "content": ...}` each; a text is one message of the user's.
            expert, max_tokens, sampling: as of `generate`.

        Raises:
            EngineError: no such expert, or it has no chat template, or a request that cannot be honoured.
        """
        (done,) = generate(self._engine, [self._chat_request(messages, expert, max_tokens, sampling)])
        if done.finish_reason == "error":
            raise EngineError(done.error or "the request failed")
        return done

    def stream(
        self, messages: str | Messages, *, expert: str = BASE, max_tokens: int | None = None, **sampling: Any
    ) -> Iterator[str]:
        """As `chat`, but yield the answer's pieces as they come; a loop that is left early cancels the rest."""
        request = self._chat_request(messages, expert, max_tokens, sampling)
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self._engine.submit(request, chunks.put)
        try:
            while True:
                chunk = chunks.get()
                if chunk.text:
                    yield chunk.text
                if chunk.finish_reason == "error":
                    raise EngineError(chunk.error or "the request failed")
                if chunk.finish_reason is not None:
                    return
        finally:
            self._engine.cancel(request.id)

    def experts(self) -> dict[str, ExpertStatus]:
        """The served experts by name: where each is, its artifact's digest and size, its requests now."""
        return {expert.name: expert for expert in self._engine.experts()}

    def load_expert(self, name: str, artifact: Artifact | str | Path) -> None:
        """Serve one more artifact, checked whole first. Raises ArtifactError, EngineError; the others serve on."""
        self._engine.load_expert(name, artifact_folder(artifact))

    def unload_expert(self, name: str) -> None:
        """Let its running requests end, then free its memory. Raises UnknownExpertError."""
        self._engine.unload_expert(name)

    def stop(self) -> None:
        """Cancel what runs, and free everything."""
        self._engine.stop()

    def _tokens(self, expert: str, text: str) -> list[int]:
        return self._engine.tokenizer(expert).encode(text, add_special_tokens=True)

    def _chat_request(
        self, messages: str | Messages, expert: str, max_tokens: int | None, sampling: Mapping[str, Any]
    ) -> GenerationRequest:
        tokenizer = self._engine.tokenizer(expert)
        if not tokenizer.chat_template:
            raise EngineError(f"expert {expert!r} has no chat template: use `generate`")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        tokens = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return self._request(expert, tokens, max_tokens, sampling)

    def _request(
        self, expert: str, tokens: Sequence[int], max_tokens: int | None, sampling: Mapping[str, Any]
    ) -> GenerationRequest:
        room = max(1, self._engine.max_model_len - len(tokens))
        limit = min(MAX_TOKENS, room) if max_tokens is None else max_tokens
        given = {name: value for name, value in sampling.items() if value is not None}
        try:
            chosen = Sampling(**{**self._engine.sampling_defaults(expert), **given, "max_tokens": limit})
        except TypeError as error:
            raise UsageError(f"no such sampling parameter: {error}") from error
        return GenerationRequest(next(self._ids), expert, tuple(tokens), chosen)


#: What a program calls it; the protocol of that name in `engine/contract.py` is a server's view of an engine.
Engine = LocalEngine
