"""Put a run's summary.md into docs/results/gpu.md, between the marks that are there for it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu.md"
BEGIN, END = "<!-- run, generated -->\n", "<!-- end of the run -->"


def with_run(page: str, summary: str) -> str:
    """The page with this run in place of what stood between the marks, its headings one level lower.

    Raises:
        ValueError: the page has no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: it needs the marks {BEGIN.strip()} and {END}")
    lowered = re.sub(r"^(#+ )", r"#\1", summary.strip(), flags=re.MULTILINE)
    return f"{before}{begin}{lowered}\n{end}{after}"
