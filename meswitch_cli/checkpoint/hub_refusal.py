"""Why the Hub did not give what it was asked for, read off the errors of its client."""

from __future__ import annotations

from meswitch_cli.errors import causes, reason_of

_LINES = 3


def why_unreachable(error: BaseException) -> str | None:
    """What to say where the Hub was not asked, or did not answer; None where it refused."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    links = causes(error)
    if not any(isinstance(link, LocalEntryNotFoundError | OfflineModeIsEnabled) for link in links):
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the Hub's cache does not hold it; unset the variable, or give a folder"
    if any(isinstance(link, HfHubHTTPError) for link in links):
        return None
    return f"the Hub cannot be reached ({reason_of(links[-1])}); go online, or give a folder"


def refusal(error: BaseException) -> str:
    """What the Hub said: the client may wrap that in an error that does not tell it."""
    return "; ".join(dict.fromkeys(map(_said, causes(error))))


def _said(error: BaseException) -> str:
    """Its first lines, as one: the client puts what the Hub objects to into the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:_LINES]
    return " ".join(lines).rstrip(".:") or reason_of(error)
