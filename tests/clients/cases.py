"""What every client's file is made of. It runs in that client's own environment, with the standard library alone.

A file names its package and its cases: functions of the server's URL, of which one that raises has failed.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping

MODEL = "red"
#: Short enough for a tiny model's context, and bounded, so that random tokens come to an end.
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def check_weather(value: Mapping[str, object] | str) -> None:
    """Whether this is what the schema allows."""
    given = json.loads(value) if isinstance(value, str) else dict(value)
    assert set(given) == {"city", "days"} and given["city"] in ("Bonn", "Rome") and 1 <= given["days"] <= 9, given


def run(package: str, cases: Mapping[str, Callable[[str], object]]) -> None:
    """Run the cases against the URL of the command line; write a line of JSON for each."""
    (url,) = sys.argv[1:]
    print(json.dumps({"version": importlib.metadata.version(package)}), flush=True)
    for name, case in cases.items():
        try:
            case(url)
            told = {"case": name, "error": None}
        except Exception as error:
            told = {"case": name, "error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(told), flush=True)
