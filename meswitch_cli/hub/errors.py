"""What the Hub and the way to it refuse, as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from meswitch_cli.errors import ArtifactError, MeswitchError, reason_of

_LINES = 3
_CLIENTS = ("httpx", "httpx2", "huggingface_hub", "hf_xet")


@contextlib.contextmanager
def hub_errors(what: str, advice: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one error: what could not be done, the reason, what to do.

    Raises:
        ArtifactError: in place of the client's errors, and of the operating system's.
    """
    try:
        yield
    except MeswitchError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RuntimeError) and not _of_the_client(error):
            raise
        reasons = dict.fromkeys(_said(link) for link in _chain(error))
        raise ArtifactError(f"{what}: {'; '.join(reasons)}. {advice}") from error


def _of_the_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _said(error: BaseException) -> str:
    """Its first lines, as one: the client puts what the Hub objects to into the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:_LINES]
    return " ".join(lines).rstrip(".:") or reason_of(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from: the client wraps the refusal of an upload in one that does not tell it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
