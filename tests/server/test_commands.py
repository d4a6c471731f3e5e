"""serve, chat and bench as a user meets them: real processes, signals, streams and exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from command_line import ENVIRONMENT, in_process, meswitch
from patience import PATIENCE, until
from server.family import Family, Running

from meswitch_cli.server.lifecycle import listen

TESTS = Path(__file__).parents[1]
Here = Callable[..., tuple[int, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """A function that runs a command that will fail, in this process: exit status and stderr."""
    monkeypatch.setattr("meswitch_cli.server.logs.configure_logging", lambda *given: None)  # it lasts

    def run(*arguments: object) -> tuple[int, str]:
        ended = in_process(*arguments)
        assert ended.stdout == "" and ended.returncode != 0
        return ended.returncode, ended.stderr

    return run


class Serving:
    """A `meswitch serve` that runs: its address, and what it has written to stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("page "):
                self._listening.set()
        self._listening.set()

    def wait(self) -> str:
        assert self._listening.wait(PATIENCE)
        page = next((line for line in self.lines if line.startswith("page ")), None)
        assert page, "".join(self.lines)
        return page.split()[1].rstrip("/")

    def said(self, word: str) -> None:
        """Wait until a line with this word has been written."""
        until(lambda: any(word in line for line in tuple(self.lines)), lambda: "".join(self.lines))

    def ended(self) -> tuple[int, str]:
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status, "".join(self.lines)


@contextmanager
def serving(*arguments: object, hold: Path | None = None) -> Iterator[Serving]:
    """With `hold`, its engine is held while that file is there."""
    program = ["meswitch_cli"] if hold is None else ["server.holding", str(hold)]
    command = [sys.executable, "-m", *program, "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    paths = [str(TESTS), *filter(None, [ENVIRONMENT.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | ({} if hold is None else {"PYTHONPATH": os.pathsep.join(paths)}),
        cwd="/",
    )
    try:
        yield Serving(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def long_stream(address: str) -> Any:
    body = {"model": "red", "prompt": "go", "max_tokens": 400, "ignore_eos": True, "stream": True}
    return httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE)


def running_now(address: str) -> int:
    return int(httpx2.get(f"{address}/v1/status", timeout=PATIENCE).json()["engine"]["running"])


def test_serve_with_a_corrupt_artifact_then_drain(family: Family, experts_dir: Path, tmp_path: Path) -> None:
    shard = next((experts_dir / "blue").glob("delta-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    (experts_dir / "notes").mkdir()
    (experts_dir / ".unfinished").mkdir()
    hold = tmp_path / "hold"
    with serving("--base", family.base, "--experts-dir", experts_dir, hold=hold) as server:
        address = server.wait()
        told = "".join(server.lines)
        assert "expert blue is not served" in told and shard.name in told
        assert "expert notes is not served" in told and ".unfinished" not in told
        assert "serving green, red, base" in told
        curl = told.split("try     ")[1].split("'\n")[0] + "'"
        answered = subprocess.run(curl, shell=True, capture_output=True, text=True, check=False)
        assert json.loads(answered.stdout)["choices"][0]["message"]["role"] == "assistant", answered.stderr
        hold.touch()
        with long_stream(address) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(f"{address}/ready", timeout=PATIENCE).status_code == 503)
            hold.unlink()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        status, told = server.ended()
        assert status == 0, told
        assert "Traceback" not in told
        logged = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        requests = [line for line in logged if line.get("path") == "/v1/completions"]
        assert requests and requests[0]["expert"] == "red" and requests[0]["completion_tokens"] == 400
        assert "12 times 12" not in "".join(line for line in told.splitlines() if line.startswith("{"))


def test_sigterm_under_load_cuts_nobody_off(family: Family, tmp_path: Path) -> None:
    """Sixteen answers on their way, half of them streamed, all come whole; the process then ends well."""
    experts = [f"--expert={name}={family.artifacts[name]}" for name in ("red", "green")]

    def ask(address: str, index: int) -> tuple[int, str]:
        body = {"model": ("red", "green", "base")[index % 3], "prompt": "go", "max_tokens": 300, "ignore_eos": True}
        stream = index % 2 == 0
        more = {"stream": stream, "return_token_ids": True}
        response = httpx2.post(f"{address}/v1/completions", json=body | more, timeout=PATIENCE)
        events = [response.text] if not stream else re.findall(r"data: ({.*})", response.text)
        choices = [json.loads(event)["choices"][0] for event in events]
        return sum(len(choice["token_ids"]) for choice in choices), choices[-1]["finish_reason"]

    hold = tmp_path / "hold"
    with serving("--base", family.base, *experts, hold=hold) as server, ThreadPoolExecutor(16) as pool:
        address = server.wait()
        hold.touch()
        answers = [pool.submit(ask, address, index) for index in range(16)]
        until(lambda: running_now(address) == 16)
        server.process.send_signal(signal.SIGTERM)
        server.said("draining")
        hold.unlink()
        assert [answer.result(PATIENCE) for answer in answers] == [(300, "length")] * 16
        status, told = server.ended()
        assert status == 0 and "Traceback" not in told, told


def test_a_second_signal_stops_at_once(family: Family, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with serving("--base", family.base, "--expert", f"red={family.artifacts['red']}", hold=hold) as server:
        address = server.wait()
        hold.touch()
        body = {"model": "red", "prompt": "go", "max_tokens": 500, "ignore_eos": True, "n": 16}
        whole: list[int] = []
        asking = threading.Thread(target=lambda: _ask(f"{address}/v1/completions", body, whole), daemon=True)
        asking.start()
        until(lambda: running_now(address) == 16)
        server.process.send_signal(signal.SIGTERM)
        server.said("draining")  # two signals at once are one to a process that has not taken the first
        server.process.send_signal(signal.SIGTERM)
        status, told = server.ended()
        assert status == 0 and "second signal" in told, told
        asking.join(PATIENCE)
        assert whole == []  # it was cut off: the drain waited for nothing


def _ask(url: str, body: dict[str, Any], whole: list[int]) -> None:
    """Ask, and note the tokens of an answer that comes whole."""
    with suppress(httpx2.HTTPError):
        response = httpx2.post(url, json=body, timeout=PATIENCE)
        if response.status_code == 200:
            whole.append(response.json()["usage"]["completion_tokens"])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--expert", "red"], 2, ["NAME=ARTIFACT"]),
        (["--expert", "auto=x"], 2, ["auto"]),
        (["--expert", "a=x", "--expert", "a=y"], 2, ["twice"]),
        (["--experts-dir", "/nowhere"], 2, ["/nowhere"]),
        (["--engine", "vllm"], 1, ["not installed", "pip install 'meswitch[vllm]'"]),
        (["--api-key-file", "/nowhere"], 1, ["/nowhere"]),
        (["--host", "192.0.2.1"], 1, ["192.0.2.1"]),
        (["--router", "/nowhere"], 1, ["/nowhere"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_a_serve_that_cannot_be(
    family: Family, arguments: list[str], status: int, words: list[str], here: Here
) -> None:
    done, told = here("serve", "--base", family.base, "--port", 0, *arguments)
    assert done == status, told
    for word in words:
        assert word in told


def test_a_taken_port_is_told_before_anything_is_loaded(family: Family, running: Running, here: Here) -> None:
    port = running.url.rpartition(":")[2]
    done, told = here("serve", "--base", family.base, "--port", port)
    assert done == 1 and f"127.0.0.1:{port}" in told and "loading" not in told


def test_a_port_is_taken_while_its_server_still_loads(family: Family, here: Here) -> None:
    with closing(listen("127.0.0.1", 0)) as bound:  # as a server has it before it listens
        port = bound.getsockname()[1]
        done, told = here("serve", "--base", family.base, "--port", port)
    assert done == 1 and f"127.0.0.1:{port}" in told and "loading" not in told


def test_a_port_is_free_as_soon_as_its_server_has_ended(family: Family) -> None:
    """The side that closes first keeps a connection in TIME_WAIT; it must not hold the port."""
    with serving("--base", family.base, "--expert", f"red={family.artifacts['red']}") as first:
        port = int(first.wait().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while client.recv(4096):
                pass
        first.process.send_signal(signal.SIGTERM)
        assert first.ended()[0] == 0
    listen("127.0.0.1", port).close()


def test_chat_with_a_server(running: Running) -> None:
    once = meswitch(
        "chat", "--url", running.url, "--model", "red", "--prompt", "hello", "--max-tokens", 8, "--temperature", 0
    )
    body = {"model": "red", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    wanted = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert once.returncode == 0 and once.stdout == wanted + "\n" and once.stderr == "red (pinned)\n"
    typed = "hello\n/model violet\n/model green\nhello\n/new\n/exit\n"
    talk = meswitch("chat", "--url", running.url, "--model", "red", "--max-tokens", 4, stdin=typed)
    assert talk.returncode == 0 and "red (pinned)" in talk.stderr and "green (pinned)" in talk.stderr
    assert "there is no 'violet'" in talk.stderr and "> " not in talk.stdout
    lost = meswitch("chat", "--url", "http://127.0.0.1:9", "--prompt", "x")
    assert lost.returncode == 1 and "is a server running there?" in lost.stderr and "Traceback" not in lost.stderr
    unknown = meswitch("chat", "--url", running.url, "--model", "violet", "--prompt", "x")
    assert unknown.returncode == 1 and "'violet' is not served" in unknown.stderr


def test_chat_in_process(family: Family, running: Running, here: Here) -> None:
    own = ("--base", family.base, "--expert", f"red={family.artifacts['red']}")
    done = meswitch("chat", *own, "--prompt", "hello", "--max-tokens", 8, "--temperature", 0)
    body = {"model": "red", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    wanted = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert done.returncode == 0, done.stderr
    assert done.stdout == wanted + "\n" and "red (pinned)" in done.stderr
    assert "still ran" not in done.stderr
    assert here("chat", "--url", running.url, *own)[0] == 2
    assert here("chat", "--expert", "a=b")[0] == 2


def test_bench(running: Running, tmp_path: Path) -> None:
    options = ("--url", running.url, "--requests", 24, "--concurrency", 6, "--max-tokens", 5, "--ignore-eos")
    done = meswitch("bench", *options, "--popularity", "zipf", "--plot", tmp_path / "load.png", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["requests"], result["failed"], result["completion_tokens"]) == (24, 0, 120)
    assert sum(expert["requests"] for expert in result["experts"].values()) == 24
    assert result["experts"]["blue"]["requests"] > 24 / 3 * 0.9  # first of the list, and Zipf's favourite
    assert 0 < result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"] <= 1000 * result["seconds"]
    assert result["tokens_per_second"] == pytest.approx(120 / result["seconds"], rel=1e-2)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    table = meswitch("bench", *options, "--model", "red", "--model", "base")
    assert table.returncode == 0 and re.search(r"base +│ +\d+", table.stdout) and "tokens/s" in table.stdout
    assert "┃ tokens/s ┃ TTFT p50 ┃ p99 ┃ ITL p50 ┃ p99 ┃" in re.sub(" +", " ", table.stdout)  # none cut off
    pdf = meswitch("bench", *options, "--plot", tmp_path / "load.pdf")
    assert pdf.returncode == 2 and "must end in .png or .svg" in pdf.stderr and pdf.stdout == ""
    failed = meswitch("bench", *options, "--model", "violet", "--json")
    assert failed.returncode == 1 and json.loads(failed.stdout)["failed"] == 24 and "violet" in failed.stderr


def test_a_missing_extra_is_named(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meswitch_cli.commands.extras.find_spec", lambda name: None)
    for command in (("serve", "--base", "x"), ("chat",), ("bench",)):
        status, told = here(*command)
        assert status == 1 and "pip install 'meswitch[serve]'" in told


def test_a_client_imports_no_web_framework() -> None:
    script = (
        "import sys; from meswitch_cli.server import ServerSettings; from meswitch_cli.client.conversation import *; "
        "loaded = {'fastapi', 'torch', 'transformers'} & set(sys.modules); "
        "from meswitch_cli.server import Service, create_app; print(loaded, 'fastapi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set() True\n"
