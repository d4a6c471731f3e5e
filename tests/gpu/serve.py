"""Part: `meswitch serve` as a process, `meswitch bench` against it, SIGTERM, and its exit status."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from gpu.figures import say
from gpu.model import Model, parser


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server lists its models.

    Raises:
        SystemExit: it ended instead.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"{url}/v1/models", timeout=2).read()
            return
        except (OSError, urllib.error.URLError):
            if server.poll() is not None:
                raise SystemExit(f"meswitch serve ended with {server.returncode} before it answered") from None
            time.sleep(0.1)


def main() -> int:
    options = parser().parse_args()
    model = Model(options.scratch, options.tiny)
    sizes = model.sizes
    count = min(4, sizes.experts)
    experts, url = model.experts("2", count), f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "meswitch_cli",
        "serve",
        "--base",
        str(model.base),
        "--port",
        url.rpartition(":")[2],
    ]
    command += ["--max-model-len", str(min(1024, sizes.max_model_len)), "--device", model.device]
    command += ["--cache-tokens", str(min(32, sizes.max_model_len) * 1024)]
    for name, path in experts.items():
        command += ["--expert", f"{name}={path}"]
    failed = True
    with model.starting():
        started = time.perf_counter()
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            wait_until_ready(server, url)
        except BaseException:
            server.kill()
            raise
        ready = time.perf_counter() - started
    say("ready", experts=count, seconds=ready)
    try:
        with model.measuring():
            answered = [bench(url, ["base", *experts], batch, sizes.new) for batch in batches(model)]
            failed = not all(answered)
    finally:
        code = stopped(server)
    return int(failed or code != 0)


def batches(model: Model) -> tuple[tuple[int, int], ...]:
    """Requests at once, and in all."""
    return ((4, 8),) if model.tiny else ((1, 10), (16, 64), (32, 128))


def bench(url: str, models: list[str], batch: tuple[int, int], new: int) -> bool:
    """One row: requests of these models in turn; whether none failed."""
    at_once, requests = batch
    command = [sys.executable, "-m", "meswitch_cli", "bench", "--url", url, "--json", "--ignore-eos"]
    command += ["--max-tokens", str(new), "--prompt-words", "8"]
    command += ["--concurrency", str(at_once), "--requests", str(requests)]
    for name in models:
        command += ["--model", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    told = json.loads(done.stdout) if done.stdout else {}
    times = {
        f"{kind}_{which}": told[kind][which] if told.get(kind) else None
        for kind in ("ttft_ms", "itl_ms")
        for which in ("p50", "p99")
    }
    counts = {name: told.get(name) for name in ("requests", "failed", "tokens_per_second")}
    say("serve", models=len(models), at_once=at_once, **counts, **times)
    return done.returncode == 0


def stopped(server: subprocess.Popen[bytes]) -> int:
    """Its exit status after SIGTERM; it is killed where that does not end it."""
    began = time.perf_counter()
    server.send_signal(signal.SIGTERM)
    try:
        code = server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        code = server.wait()
    say("stop", signal="SIGTERM", exit=code, seconds=time.perf_counter() - began)
    return code


if __name__ == "__main__":
    sys.exit(main())
