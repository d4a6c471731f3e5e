"""An engine that is held computes nothing, and does all else."""

from __future__ import annotations

from typing import Any

from engine.family import Family
from engine.held import gathered, held
from engine.traffic import Start, Traffic, one
from patience import until

from meswitch_cli.engine import TransformersEngine


class Looks:
    """How often an engine has looked for work between two batches."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.count = 0
        go_on = engine.before_batch

        def look(loop: Any) -> None:
            self.count += 1
            go_on(loop)

        engine.before_batch = look


def test_nothing_is_computed_but_requests_are_cancelled(family: Family, start: Start) -> None:
    engine = start(family)
    looks, traffic = Looks(engine), Traffic(engine)
    with held(engine, after=3) as release:
        traffic.submit(one("alpha", tokens=60))
        traffic.submit(one("beta", tokens=60))
        until(lambda: looks.count > 50)
        assert 0 < len(traffic.chunks["alpha-0"]) <= 4
        engine.cancel("beta-0")
        until(lambda: traffic.chunks["beta-0"][-1].finish_reason)
        release()
        ended = traffic.wait()
    assert ended["beta-0"].finish_reason == "cancelled"
    assert ended["alpha-0"].tokens == family.greedy(one("alpha", tokens=60))


def test_what_was_gathered_begins_together(family: Family, start: Start) -> None:
    engine = start(family)
    looks, traffic = Looks(engine), Traffic(engine)
    with gathered(engine, 2):
        traffic.submit(one("alpha"))
        until(lambda: looks.count > 50)
        assert not traffic.chunks["alpha-0"]
        traffic.submit(one("beta"))
        assert {item.finish_reason for item in traffic.wait().values()} == {"length"}
