"""A function that reports on the way, as a generator."""

import threading
import weakref
from collections.abc import Callable
from contextlib import closing

import pytest

from meswitch_cli.calibration.turns import in_turns


def test_each_stands_still_while_the_other_works() -> None:
    log: list[str] = []

    def run(report: Callable[[int], None]) -> None:
        for number in range(3):
            log.append(f"made {number}")
            report(number)
        log.append("ended")

    found = in_turns(run)
    assert log == []  # nothing happens before it is asked for
    for number in found:
        log.append(f"used {number}")
    assert log == ["made 0", "used 0", "made 1", "used 1", "made 2", "used 2", "ended"]


def test_what_it_raises_is_raised_here() -> None:
    def run(report: Callable[[int], None]) -> None:
        report(1)
        raise KeyError("lost")

    found = in_turns(run)
    assert next(found) == 1
    with pytest.raises(KeyError, match="lost"):
        next(found)


def test_leaving_early_ends_it() -> None:
    ended = threading.Event()

    def run(report: Callable[[int], None]) -> None:
        try:
            for number in range(100):
                report(number)
        except Exception:
            pytest.fail("somebody else's handler must not keep it alive")
        finally:
            ended.set()

    with pytest.raises(ZeroDivisionError), closing(in_turns(run)) as found:
        for number in found:
            1 // (2 - number)
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("turns")]


def test_a_report_is_let_go_of_before_the_next_is_made() -> None:
    class Large:
        pass

    alive: list[weakref.ref[Large]] = []
    counts: list[int] = []

    def run(report: Callable[[Large], None]) -> None:
        for _ in range(3):
            counts.append(sum(item() is not None for item in alive))
            item = Large()
            alive.append(weakref.ref(item))
            report(item)
            del item

    for item in in_turns(run):
        del item
    assert counts == [0, 0, 0]
