"""Names of repositories on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?")


@dataclass(frozen=True)
class HubName:
    """`owner/name`, or `owner/name@revision`: a branch, a tag or a commit."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """The name that a text is; None where it can be none, as a path cannot."""
        found = _NAME.fullmatch(text)
        return found and cls(found["repo"], found["revision"])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"
