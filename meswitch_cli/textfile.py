"""Text that people and other programs wrote: UTF-8, with a byte-order mark or without, lines ended in any way."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.errors import MeswitchError

#: How lines end. `str.splitlines` also splits at U+0085 and U+2028, which may stand inside a line.
_LINE_END = re.compile(r"\r\n|\r|\n")
_OTHER_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class TextFile:
    """A file's text, its mark left out, and its bytes as they are."""

    text: str
    raw: bytes

    @property
    def lines(self) -> list[str]:
        return _LINE_END.split(self.text)


def read_text(path: Path, error: type[MeswitchError], holds: str) -> TextFile:
    """Read a whole file.

    Args:
        path: the file.
        error: what is raised where it cannot be used.
        holds: what it should hold, for messages: "a file of keys".

    Raises:
        MeswitchError: of the kind `error`: no such file, or not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from reason
    try:
        return TextFile(raw.decode().removeprefix("\ufeff"), raw)
    except UnicodeDecodeError as reason:
        number = len(_LINE_END.findall(raw[: reason.start].decode("utf-8", "replace"))) + 1
        other = next((name for mark, name in _OTHER_MARKS.items() if raw.startswith(mark)), None)
        found = f"not UTF-8 text but {other}" if other else "not UTF-8 text"
        raise error(f"{path}: line {number}: {found}; {holds} must be UTF-8") from reason
