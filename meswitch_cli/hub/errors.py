"""What the Hub and the way to it refuse, as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from meswitch_cli.checkpoint.hub_refusal import refusal, why_unreachable
from meswitch_cli.errors import ArtifactError, MeswitchError

_CLIENTS = ("httpx", "httpx2", "huggingface_hub", "hf_xet")


@contextlib.contextmanager
def hub_errors(what: str, advice: str, offline: str = "or give a folder") -> Iterator[None]:
    """Turn whatever the Hub's client raises into one error: what could not be done, the reason, what to do.

    `offline` is what there is to do beside going online.

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
        why = why_unreachable(error, offline) or f"{refusal(error)}. {advice}"
        raise ArtifactError(f"{what}: {why}") from error


def _of_the_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENTS
