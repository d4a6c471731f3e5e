"""Run every snippet of README and docs on tiny models, in the order in which a page has them.

`python tests snippets PYTHON [PAGE ...]` runs them with another environment's Python, as a reader would: one into which
only the wheel, with its extras `serve` and `plot`, and `openai` were installed. What cannot run here is listed, with
the reason. The Hub is a stand-in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import Forked, Result, Running

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/commands/*.md")))
#: What a page's line begins with, and why it is not run.
NOT_RUN = {
    "pip install": "it made the environment that the others run in",
    "docker ": "needs Docker; tests read the files",
    "make ": "needs a clone; `make test` is what runs this, `make demo` and `make gpu` are programs of their own",
    "python3 -m venv": "vLLM needs an environment of its own: `make vllm`",
    "from vllm import": "vLLM needs an environment of its own: `make vllm` runs `test_vllm_offline.py`",
    "vllm-env/": "vLLM needs an environment of its own: `make vllm`",
    "curl http://127.0.0.1:8000/v1/load_lora_adapter": "asks vLLM's server: `make vllm`",
    "meswitch train-router --base ./base --artifact": "a base of random weights tells no fields apart; tests/router",
    "meswitch --install-completion": "changes the start-up file of the reader's shell",
}
#: Blocks that are no commands.
SAMPLES = ('{"prompt": ', "router.json ")
SERVER = "127.0.0.1:8000"
#: How long a command or a server may take.
SECONDS = 600
#: The names that pages give to what is on the Hub; the shape of the second is in its config alone.
ARTIFACT, BASE, MISTRAL = "ann/llama-maths-1bit", "meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"


@dataclass
class Reader:
    """Follows pages in one folder; keeps the server that a page starts until it starts another, or ends.

    Attributes:
        done: lines that ran.
        skipped: lines that did not, each with the reason.
    """

    program: Forked
    folder: Path
    done: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _server: Running | None = None
    _port: int = 0

    def follow(self, page: Path) -> None:
        """Run a page's blocks. Raises AssertionError with the line, and what it told, where one fails."""
        code: list[str] = []
        try:
            for language, text in blocks(page):
                if language == "python":
                    if not self._skips(text):
                        code.append(text)
                elif language in ("yaml", "toml"):
                    (self.folder / f"options.{language}").write_text(text, encoding="utf-8")
                    self._serve(["serve", "--config", f"options.{language}"])
                    self.done.append(f"options.{language}")
                elif not text.startswith(SAMPLES):
                    for line in text.replace("\\\n", " ").splitlines():
                        self._line(line)
            if code:
                self._python("\n".join(code))
        finally:
            self._stop()

    def _skips(self, text: str) -> bool:
        """Whether a line, or a block of Python, is not run; it is noted then."""
        reason = next((reason for beginning, reason in NOT_RUN.items() if text.startswith(beginning)), None)
        if reason is not None:
            self.skipped.append((text, reason))
        return reason is not None

    def _line(self, line: str) -> None:
        if self._skips(line):
            return
        words, stdin = shlex.split(line, comments=True), ""
        if "<" in words:
            at = words.index("<")
            stdin, words = (self.folder / words[at + 1]).read_text(encoding="utf-8"), words[:at]
        if words[0] == "curl":
            self._curl(line, [word.replace(SERVER, f"127.0.0.1:{self._server_port()}") for word in words])
        else:
            assert words[0] == "meswitch", f"what is this line? {line}"
            self._meswitch(line, words[1:], stdin)
        self.done.append(line)

    def _meswitch(self, line: str, words: list[str], stdin: str) -> None:
        if words[0] == "serve":
            self._serve(words)
            return
        if words[0] in ("chat", "bench") and "--base" not in words:
            given = words[:1] + [word for word in words[1:] if word != "--url" and SERVER not in word]
            words = [*given, "--url", f"http://127.0.0.1:{self._server_port()}"]
            stdin = "What is 12 times 12?\n"
        short = {"chat": ["--max-tokens", "4"], "bench": ["--max-tokens", "2", "--requests", "6"]}
        if "--out" in words and words[0] != "eval":
            self._forget(words[words.index("--out") + 1])
        told = self.program.run([*words, *short.get(words[0], [])], stdin=stdin, cwd=self.folder, timeout=SECONDS)
        limits = {"--min-recovery", "--max-kld"} & set(words)  # random models may miss one, and that is told with 1
        missed = limits and told.returncode == 1 and "limit" in told.stdout + told.stderr
        assert told.returncode == 0 or missed, f"{line}\n{told.stdout}\n{told.stderr}"

    def _python(self, code: str) -> None:
        """A page's Python blocks, as one program."""
        for made in re.findall(r"(?:compress|restore)\([^)]*\"(\./[\w-]+)\"(?:, bits=\d+)?\)", code):
            self._forget(made)
        if SERVER in code:
            code = code.replace(SERVER, f"127.0.0.1:{self._server_port()}")
        told = self.program.run(["-c", code], cwd=self.folder, timeout=SECONDS)
        assert told.returncode == 0, f"{code}\n{told.stderr}"
        self.done.append(f"Python, {len(code.splitlines())} lines")

    def _curl(self, line: str, words: list[str]) -> None:
        told = subprocess.run([*words, "--silent", "--show-error", "--noproxy", "*"], capture_output=True, text=True)
        assert told.returncode == 0 and "error" not in json.loads(told.stdout), f"{line}\n{told.stdout}\n{told.stderr}"

    def _forget(self, made: str) -> None:
        """What a page makes, other pages find made already."""
        if (self.folder / made).is_dir():
            shutil.rmtree(self.folder / made)

    def _server_port(self) -> int:
        if self._server is None:
            experts = ["--expert", "maths=./maths-1bit", "--expert", "code=./code-1bit"]
            self._serve(["serve", "--base", "./base", *experts, "--router", "./router"])
        return self._port

    def _serve(self, words: list[str]) -> None:
        self._stop()
        limits = ["--port", "0", "--device", "cpu", "--cache-tokens", "2048"]
        self._server = self.program.start([*words, *limits], cwd=self.folder, timeout=SECONDS)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(5 * SECONDS):
            if self.program.ended(self._server):
                break
            told = self._told(self._server)
            if listens := re.search(r"(?:page +|behind )http://\S+?:(\d+)", told):
                self._port = int(listens[1])
                with contextlib.suppress(OSError):
                    opener.open(f"http://127.0.0.1:{self._port}/ready", timeout=60).close()
                    return
            time.sleep(0.2)
        self._stop(f"never ready: meswitch {shlex.join(words)}")

    def _told(self, server: Running) -> str:
        """What it has written to stderr, which is a file once it has begun."""
        stderr = server.folder / "stderr"
        return stderr.read_text(encoding="utf-8") if stderr.exists() else ""

    def _stop(self, why: str = "") -> None:
        if self._server is not None:
            server, self._server = self._server, None
            os.kill(server.id, signal.SIGTERM)
            told = self.program.wait(server)
            assert told.returncode == 0 and not why, f"{why}\n{told.returncode}\n{told.stdout}\n{told.stderr}"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language of each fenced block of a page, empty for a shell's, and its text."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def make_folder(folder: Path, program: Forked) -> None:
    """All that pages take for granted: models, prompts, artifacts, a router, keys; and what is on the stand-in Hub."""
    import torch

    from zoo.tiny import make_pair

    for index, name in enumerate(("maths", "code")):
        base, expert = make_pair(folder / "made" / name, dtype=torch.float32, relative_delta=0.2 + 0.1 * index)
        expert.rename(folder / name)
        if index == 0:
            base.rename(folder / "base")
    shutil.copytree(folder / "maths", folder / "expert")
    asked: dict[str, Callable[[int], str]] = {
        "maths": lambda n: f"Tom has {n} apples and buys {97 - n} more. How many are there?",
        "code": lambda n: f"def f{n}(x): return x[{n}:] # write the loop",
        "law": lambda n: f"May a tenant of section {n} be given notice in writing within {n} days?",
    }
    lines = {
        name: [{"prompt": ask(n), "response": f"it is {n}, of course", "answer": str(n)} for n in range(40)]
        for name, ask in asked.items()
    }
    for name, items in lines.items():
        _write(folder / f"{name}.jsonl", items)
    both = [item | {"domain": name} for name in ("maths", "code") for item in lines[name]]
    _write(folder / "prompts.jsonl", both)
    _write(folder / "held-out.jsonl", both[::8])
    _write(folder / "feedback.jsonl", [{"prompt": both[0]["prompt"], "domain": "maths"}])
    _write(folder / "other-fields.jsonl", [{"prompt": f"Where is the {n}th river?", "domain": None} for n in range(20)])
    (folder / "prompt.txt").write_text(both[3]["prompt"], encoding="utf-8")
    (folder / "keys").write_text("secret-key-of-a-page\n", encoding="utf-8")
    for name, *outs in (
        ("maths", "experts/maths", "maths-1bit", "expert-1bit", "law-2bit"),
        ("code", "experts/code", "code-1bit"),
    ):
        _must(
            program.run(
                ["compress", "--base", "./base", "--expert", f"./{name}", "--out", outs[0]], cwd=folder, timeout=SECONDS
            )
        )
        for out in outs[1:]:
            shutil.copytree(folder / outs[0], folder / out)
    train = ["train-router", "--base", "./base", "--expert", "maths=maths.jsonl", "--expert", "code=code.jsonl"]
    _must(program.run([*train, "--out", "./router"], cwd=folder, timeout=SECONDS))


def fill_hub(folder: Path, repositories: dict[str, Any]) -> None:
    """The base under the name that pages give it, and a config of Mistral's shape, in a stand-in's `repositories`."""
    from hub.standin import Repository

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 8, **shape}
    config |= {"vocab_size": 32000, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
    held = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    for name, files in ((BASE, held), (MISTRAL, {"config.json": json.dumps(config).encode()})):
        repositories[name] = Repository(private=False)
        repositories[name].commit("main", {path: (data, None) for path, data in files.items()})
    repositories[ARTIFACT] = Repository(private=False)
    oid = repositories[ARTIFACT].commit(
        "main", {path.name: (path.read_bytes(), None) for path in (folder / "maths-1bit").iterdir()}
    )
    repositories[ARTIFACT].branches["v1"] = oid


def environment(endpoint: str, cache: Path) -> dict[str, str]:
    """The variables under which a program takes the stand-in for the Hub."""
    from hub.standin import TOKEN

    ours = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    quiet = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_PROXY": "127.0.0.1,localhost"}
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | ours | quiet


def _write(path: Path, items: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def _must(told: Result) -> None:
    assert told.returncode == 0, f"{shlex.join(told.args)}\n{told.stderr}"


@contextlib.contextmanager
def reader_of(made: Path, program: Forked) -> Iterator[Reader]:
    """A reader in a copy of a folder that `make_folder` filled."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(made, Path(folder) / "here")
        yield Reader(program, Path(folder) / "here")


def main() -> int:
    from hub.standin import standin

    parser = argparse.ArgumentParser(prog="tests snippets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("python", type=Path, help="the Python of an environment that meswitch is installed in")
    parser.add_argument("page", type=Path, nargs="*", help="all of them, where none is named")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, standin() as hub:
        program = Forked(environment(hub.endpoint, Path(folder) / "cache"), given.python.absolute())
        subprocess.run([given.python.absolute().with_name("meswitch"), "--version"], check=True)
        made = Path(folder) / "made"
        made.mkdir()
        make_folder(made, program)
        fill_hub(made, hub.repositories)
        for page in given.page or PAGES:
            with reader_of(made, program) as reader:
                try:
                    reader.follow(page.absolute())
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    failed += 1
                    print(f"{page.name}: FAILED\n{error}", flush=True)
                if reader.done or reader.skipped:
                    print(f"{page.name}: {len(reader.done)} ran", flush=True)
                for line, reason in reader.skipped:
                    print(f"    not run: {line}\n        {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
