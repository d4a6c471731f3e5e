"""A conversation with a server, answers streamed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meswitch_cli.client.answers import AnswerDecoder, message_of
from meswitch_cli.client.client import Endpoint
from meswitch_cli.errors import MeswitchError


@dataclass(frozen=True)
class AnswerChunk:
    """What is new of an answer; the first chunk has no text and says who answers and why.

    Attributes:
        prompt_tokens, completion_tokens: of the whole, in the chunk with which a server tells them; else None.
    """

    text: str
    expert: str | None = None
    reason: str = ""
    confidence: float = 1.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Conversation:
    """What was said so far, and with whom it goes on.

    Attributes:
        model: who answers next.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.endpoint, self.model, self._system = endpoint, model, system
        given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        self._options = {name: value for name, value in given.items() if value is not None}
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._session = uuid.uuid4().hex

    def ask(self, text: str) -> Iterator[AnswerChunk]:
        """Say something and stream the answer; what failed or was broken off is not part of the conversation.

        Raises:
            MeswitchError: the server does not answer, refuses, or fails on the way.
        """
        import httpx2

        asked = [*self.messages, {"role": "user", "content": text}]
        body: dict[str, Any] = {"model": self.model, "messages": asked, "stream": True} | self._options
        body["stream_options"] = {"include_usage": True}
        answer, decoder = "", AnswerDecoder()
        try:
            with (
                self.endpoint.client() as client,
                client.stream(
                    "POST", "/v1/chat/completions", json=body, headers={"x-meswitch-session": self._session}
                ) as response,
            ):
                if response.status_code != 200:
                    raise MeswitchError(message_of(response.read(), response.status_code))
                headers = response.headers
                yield AnswerChunk(
                    "",
                    headers.get("x-meswitch-expert", self.model),
                    headers.get("x-meswitch-reason", "named"),
                    float(headers.get("x-meswitch-confidence", 1)),
                )
                for content in response.iter_bytes():
                    for progress in decoder.push(content):
                        answer += progress.text
                        yield AnswerChunk(
                            progress.text,
                            prompt_tokens=progress.prompt_tokens,
                            completion_tokens=progress.completion_tokens,
                        )
                decoder.finish()
        except (httpx2.HTTPError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise self.endpoint.failure(error) from error
        self.messages = [*asked, {"role": "assistant", "content": answer}]
