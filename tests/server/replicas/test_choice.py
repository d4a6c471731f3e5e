"""Which replica a request goes to."""

from __future__ import annotations

import pytest

from meswitch_cli.errors import MeswitchError
from meswitch_cli.server.replicas.choice import MOST_MORE, Load, choose
from meswitch_cli.server.replicas.metrics import joined_metrics, resident_experts
from meswitch_cli.server.replicas.server import environments, replica_arguments


def loads(*requests: int) -> list[Load]:
    return [Load(number, True, count) for number, count in enumerate(requests)]


def test_a_replica_that_has_the_expert_is_asked_unless_it_has_much_more_to_do() -> None:
    replicas = loads(0, MOST_MORE, 1)
    replicas[1].resident = frozenset({"maths"})
    assert choose(replicas, "maths", None) is replicas[1]
    replicas[1].requests += 1
    assert choose(replicas, "maths", None) is replicas[0]
    replicas[2].resident = frozenset({"maths", "code"})
    assert choose(replicas, "maths", None) is replicas[2]


def test_the_base_and_what_is_routed_go_to_the_idlest() -> None:
    replicas = loads(2, 1, 1)
    assert choose(replicas, None, None) is replicas[1]


def test_who_is_not_ready_is_not_asked() -> None:
    replicas = loads(0, 5)
    replicas[0].ready = False
    replicas[0].resident = frozenset({"maths"})
    assert choose(replicas, "maths", None) is replicas[1]
    replicas[1].ready = False
    assert choose(replicas, "maths", None) is None


def test_experts_that_nobody_has_are_spread_and_stay_where_they_fall() -> None:
    names = [f"expert-{number}" for number in range(200)]
    before = {name: choose(loads(0, 0, 0), name, None).number for name in names}  # type: ignore[union-attr]
    assert before == {name: choose(loads(1, 2, 3), name, None).number for name in names}  # type: ignore[union-attr]
    assert min(list(before.values()).count(number) for number in range(3)) > 40
    fewer = loads(0, 0, 0)
    fewer[2].ready = False
    after = {name: choose(fewer, name, None).number for name in names}  # type: ignore[union-attr]
    assert all(after[name] == before[name] for name in names if before[name] != 2)


def test_a_session_keeps_its_replica_whatever_its_load() -> None:
    for key in map(str, range(20)):
        first = choose(loads(0, 0, 0), None, key)
        again = loads(0, 0, 0)
        again[first.number].requests = 100  # type: ignore[union-attr]
        assert choose(again, "maths", key) is again[first.number]  # type: ignore[union-attr]


METRICS = """# HELP meswitch_expert_on_device Whether it is on the device.
# TYPE meswitch_expert_on_device gauge
meswitch_expert_on_device{expert="maths"} 1.0
meswitch_expert_on_device{expert="code"} 0.0
# HELP meswitch_requests_total Requests.
# TYPE meswitch_requests_total counter
meswitch_requests_total{model="a \\"b\\""} 3.0
"""


def test_metrics_are_read_and_joined() -> None:
    assert resident_experts(METRICS) == {"maths"}
    joined = joined_metrics({0: METRICS, 1: METRICS.replace("3.0", "4.0")})
    assert joined.count("# TYPE meswitch_requests_total counter") == 1
    assert 'meswitch_requests_total{model="a \\"b\\"",replica="0"} 3.0' in joined
    assert 'meswitch_requests_total{model="a \\"b\\"",replica="1"} 4.0' in joined


def test_a_replica_is_the_same_command_without_what_is_the_fronts() -> None:
    arguments = ["--base", "x", "--replicas", "2", "--host=0.0.0.0", "--port", "80", "--expert", "a=b", "--replicas=3"]
    assert replica_arguments(arguments) == ["--base", "x", "--expert", "a=b"]


def test_each_replica_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environments(3, "cpu", 8) == environments(3, "auto", 0) == [{}, {}, {}]
    assert environments(2, "auto", 4) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert environments(2, "auto", 4, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert environments(2, "cuda", 2) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    with pytest.raises(MeswitchError, match="there are 2 GPUs, and each replica takes 2"):
        environments(2, "auto", 2, 2)
    with pytest.raises(MeswitchError, match="cuda:1 names one"):
        environments(2, "cuda:1", 4)
