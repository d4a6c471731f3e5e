"""Why the Hub did not give what it was asked for, read off the errors of its client."""

from __future__ import annotations

from meswitch_cli.errors import causes, reason_of

_LINES = 3


def why_unreachable(error: BaseException, advice: str = "or give a folder") -> str | None:
    """What to say where the Hub was not asked, or did not answer; None where it refused.

    `advice` is what else there is to do than to go online.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    links = causes(error)
    missed = any(isinstance(link, LocalEntryNotFoundError) for link in links)
    offline = any(isinstance(link, OfflineModeIsEnabled) for link in links)
    if constants.HF_HUB_OFFLINE and (missed or offline):
        cached = ", and the Hub's cache does not hold it" if missed else ""
        return f"HF_HUB_OFFLINE is set{cached}; unset the variable, {advice}"
    if any(isinstance(link, HfHubHTTPError) for link in links):
        return None
    if missed or offline or any(map(_is_of_the_way, links)):
        return f"the Hub cannot be reached ({reason_of(links[-1])}); go online, {advice}"
    return None


def _is_of_the_way(error: BaseException) -> bool:
    """Whether no answer came. Which HTTP client the Hub's takes, httpx or httpx2, depends on its version."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def refusal(error: BaseException) -> str:
    """What the Hub said: the client may wrap that in an error that does not tell it."""
    return "; ".join(dict.fromkeys(map(_said, causes(error))))


def _said(error: BaseException) -> str:
    """Its first lines, as one: the client puts what the Hub objects to into the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:_LINES]
    return " ".join(lines).rstrip(".:") or reason_of(error)
