"""Two real servers behind one address; one is killed while both answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from engine.family import Family
from server.family import make_family

SECONDS = 900
ANSWER = 48
TESTS = Path(__file__).parents[2]
#: What each process of a front does first: its engine, where it has one, is held while a file is there.
HOLDING = """
import os, pathlib
from server.holding import hold_while
hold_while(pathlib.Path(os.environ["HOLD"]))
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


class RunningFront:
    """`meswitch serve --replicas 2` in a process of its own."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.hold, self.log, customised = folder / "hold", folder / "log", folder / "customised"
        customised.mkdir()
        (customised / "sitecustomize.py").write_text(HOLDING)
        paths = [str(customised), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        experts = [word for name, path in family.artifacts.items() for word in ("--expert", f"{name}={path}")]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "meswitch_cli", "serve", "--base", str(family.base), *experts),
                    *("--slots", "1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "4096"),
                    *("--replicas", "2", "--port", "0", "--drain-seconds", str(SECONDS)),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "HOLD": str(self.hold)},
            )
        self.wait(lambda: "replicas are starting behind" in self.log.read_text())
        (address,) = re.findall(r"starting behind (\S+)", self.log.read_text())
        self.client = httpx2.Client(base_url=address, timeout=SECONDS)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def hold_both(self, requests: int) -> None:
        """Wait until each replica has some of the requests, which outlast whatever is done until `hold` is gone."""
        self.wait(lambda: min(self.running()) > 0 and sum(self.running()) == requests)

    def running(self) -> list[float]:
        """Requests that run, by replica; none where it tells nothing."""
        text = self.client.get("/metrics").text
        found = [
            re.search(rf'^meswitch_running{{[^}}]*replica="{number}"[^}}]*}} (\S+)$', text, re.M) for number in "01"
        ]
        return [float(match[1]) if match else 0.0 for match in found]

    def ready(self) -> dict[str, bool]:
        try:
            response = self.client.get("/ready")
        except httpx2.TransportError:
            return {}
        return response.json()["replicas"] if response.status_code == 200 else {}

    def complete(self, model: str, **options: object) -> httpx2.Response:
        body = {"model": model, "prompt": "abc", "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, **options}
        return self.client.post("/v1/completions", json=body)

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


@pytest.fixture(scope="module")
def front(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    running = RunningFront(family, tmp_path_factory.mktemp("front"))
    try:
        running.wait(lambda: all(running.ready().values()) and len(running.ready()) == 2)
        yield running
    finally:
        running.client.close()
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(SECONDS)


def test_an_expert_is_answered_where_it_is(front: RunningFront) -> None:
    """One slot each: with two experts at two replicas nothing need be loaded again."""
    home = {}
    for name in ("red", "green", "blue", "base"):
        first = front.complete(name)
        assert first.status_code == 200, first.text
        home[name] = first.headers["x-meswitch-replica"]
        assert first.json()["choices"][0]["finish_reason"] == "length"
    time.sleep(2.5)  # the front has looked at the replicas since
    assert front.complete("blue").headers["x-meswitch-replica"] == home["blue"]
    assert front.complete("nobody").status_code == 404
    assert front.client.get("/v1/models").status_code == 200
    metrics = front.client.get("/metrics").text
    assert 'replica="0"' in metrics and 'replica="1"' in metrics


def test_a_stream_is_passed_on_as_it_comes(front: RunningFront) -> None:
    body = {"model": "red", "prompt": "abc", "max_tokens": ANSWER, "ignore_eos": True, "stream": True, "temperature": 0}
    times, events = [], []
    with front.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
                times.append(time.monotonic())
    assert events[-1] == "[DONE]" and len(events) > 10
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1] if json.loads(event)["choices"])
    assert text == front.complete("red").json()["choices"][0]["text"]


def test_a_replica_that_is_killed_fails_its_own_requests_alone_and_comes_back(front: RunningFront) -> None:
    before = front.pids()
    front.hold.touch()
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(front.complete, "base", max_tokens=400) for _ in range(12)]
        front.hold_both(12)
        os.kill(before[0], signal.SIGKILL)
        front.hold.unlink()
        answers = [item.result() for item in asked]
    failed = [answer for answer in answers if answer.status_code != 200]
    assert all(answer.status_code == 502 and answer.json()["error"]["code"] == "replica_failed" for answer in failed)
    assert 0 < len(failed) < 12
    survivor = {answer.headers["x-meswitch-replica"] for answer in answers if answer.status_code == 200}
    assert len(survivor) == 1
    assert front.complete("red").status_code == 200
    front.wait(lambda: all(front.ready().values()) and len(front.ready()) == 2)
    assert before[0] not in front.pids() and before[1] in front.pids()


def test_a_signal_ends_all_once_what_runs_has_been_answered(front: RunningFront) -> None:
    children = front.pids()
    front.hold.touch()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(front.complete, "base", max_tokens=200) for _ in range(4)]
        front.hold_both(4)
        front.process.send_signal(signal.SIGTERM)
        front.hold.unlink()
        assert [item.result().status_code for item in asked] == [200] * 4
    assert front.process.wait(SECONDS) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
