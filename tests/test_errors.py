"""What an exception of somebody else's says in one line of ours."""

import pytest

from meswitch_cli.errors import reason_of


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\ntwo"), "one"),
        (OSError(2, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
        (RuntimeError("\n  first of all\nthen"), "first of all"),
        (KeyError(), "KeyError"),
        (ValueError(" \n "), "ValueError"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_the_first_line_or_the_kind(error: Exception, expected: str) -> None:
    assert reason_of(error) == expected
