"""`meswitch serve --engine vllm` as a user meets it: its processes begin afresh, and none outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from command_line import ENVIRONMENT
from engine.family import Family
from engine.vllm.conftest import NEEDS_VLLM
from engine.vllm.plain_server import free_port
from engine.vllm.processes import ENVIRONMENT as FOR_VLLM
from engine.vllm.processes import children

from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling

pytestmark = NEEDS_VLLM

START_SECONDS = 900
PROMPT = (5, 6, 7)
LONG = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "temperature": 0}
STREAMED = {"stream": True, "return_token_ids": True}


class Served:
    """A server that answers, and the processes that it has begun."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self.children = psutil.Process(process.pid).children(recursive=True)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=60)

    def stream(self, model: str) -> list[dict[str, Any]]:
        """The events of a long answer."""
        response = httpx2.post(f"{self.url}/v1/completions", json={"model": model} | LONG | STREAMED, timeout=300)
        assert response.status_code == 200, response.text
        return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]

    def wait_for(self, requests: int) -> None:
        """Return once so many run or wait."""
        deadline = time.monotonic() + 60
        while True:
            engine = self.get("/v1/status").json()["engine"]
            if engine["running"] + engine["waiting"] >= requests:
                return
            assert time.monotonic() < deadline, engine

    def left(self, seconds: float) -> list[psutil.Process]:
        """The processes that are still there after so long."""
        return psutil.wait_procs([child for child in self.children if child.is_running()], timeout=seconds)[1]


@contextmanager
def serve(family: Family, folder: Path, *options: str) -> Iterator[Served]:
    port, log = free_port(), folder / "log"
    experts = [word for name, path in family.artifacts.items() for word in ("--expert", f"{name}={path}")]
    command = [
        *(sys.executable, "-m", "meswitch_cli", "serve", "--engine", "vllm", "--base", str(family.base), *experts),
        *("--port", str(port), "--dtype", "float32", "--max-model-len", "128", "--cache-tokens", "4096", *options),
    ]
    environment = ENVIRONMENT | FOR_VLLM | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                if httpx2.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.5)
        yield Served(process, url, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("how", ["terminate", "ctrl-c"])
def test_a_signal_lets_running_requests_end(how: str, family: Family, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to vLLM's processes too."""
    with serve(family, tmp_path) as server, ThreadPoolExecutor(6) as pool:
        models = [BASE, *family.artifacts] * 2
        answers = [pool.submit(server.stream, model) for model in models[:6]]
        server.wait_for(6)
        if how == "ctrl-c":
            os.killpg(server.process.pid, signal.SIGINT)
        else:
            server.process.send_signal(signal.SIGTERM)
        for model, answer in zip(models, answers, strict=False):
            events = answer.result()
            assert events[-1]["choices"][0]["finish_reason"] == "length", events[-1]
            tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
            sampling = Sampling(temperature=0, max_tokens=100, ignore_eos=True)
            assert tuple(tokens) == family.greedy(GenerationRequest("x", model, PROMPT, sampling))
        assert server.process.wait(120) == 0, server.log.read_text()
        assert not server.left(10)


def test_no_process_outlives_a_server_that_is_killed(family: Family, tmp_path: Path) -> None:
    with serve(family, tmp_path) as server:
        server.process.kill()
        server.process.wait()
        assert not server.left(60)


def test_a_killed_worker_fails_the_server_with_the_reason(family: Family, tmp_path: Path) -> None:
    with serve(family, tmp_path) as server, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.stream, model) for model in (BASE, "alpha")]
        server.wait_for(2)
        (worker,) = children("Worker", server.process.pid)
        worker.kill()
        events = [answer.result()[-1] for answer in answers]
        told = [event.get("error", {}).get("message") or event["choices"][0]["finish_reason"] for event in events]
        assert all("vLLM's processes have ended" in text for text in told), told
        assert server.get("/health").status_code == 503
