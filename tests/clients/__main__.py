"""Real clients against a live server of tiny experts, each in an environment of its own; writes docs/clients.md.

`python tests clients FOLDER` looks below FOLDER for an environment of each client: a virtual environment of its name,
or `node` with its modules. Clients whose environment is missing are left out; `--install` makes it first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
BEGIN, END = "<!-- clients, generated -->\n", "<!-- end of clients -->"
SECONDS = 600


@dataclass(frozen=True)
class Client:
    """A client: its name, the file of its cases, and the packages that it is installed from."""

    name: str
    file: str
    packages: tuple[str, ...]

    @property
    def is_node(self) -> bool:
        return self.file.endswith(".mjs")


_AI = ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic", "zod")
CLIENTS = (
    Client("openai", "openai_python.py", ("openai",)),
    Client("anthropic", "anthropic_python.py", ("anthropic",)),
    Client("litellm", "litellm_python.py", ("litellm",)),
    Client("langchain-openai", "langchain_python.py", ("langchain-openai",)),
    Client("langchain-anthropic", "langchain_anthropic_python.py", ("langchain-anthropic",)),
    Client("llm", "llm_python.py", ("llm",)),
    Client("instructor", "instructor_python.py", ("instructor",)),
    Client("pydantic-ai", "pydantic_ai_python.py", ("pydantic-ai-slim[openai,anthropic]",)),
    Client("openai-agents", "openai_agents_python.py", ("openai-agents",)),
    Client("openai (node)", "openai_node.mjs", ("openai",)),
    Client("ai (node)", "ai_node.mjs", _AI),
)
COLUMNS = (
    "chat",
    "stream",
    "JSON schema",
    "tools",
    "streamed tools",
    "Responses",
    "Anthropic's messages",
    "embeddings",
)
#: Clients that speak Anthropic's API and no other.
ANTHROPICS = ("anthropic", "langchain-anthropic")


def environment(folder: Path, client: Client) -> Path:
    return folder / ("node" if client.is_node else client.name)


def install(folder: Path, client: Client) -> None:
    """Make a client's environment, unless it is there."""
    made = environment(folder, client)
    if client.is_node:
        made.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", *client.packages], cwd=made, check=True)
    elif not made.exists():
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        subprocess.run([made / "bin" / "python", "-m", "pip", "install", "--quiet", *client.packages], check=True)


def try_client(folder: Path, client: Client, url: str) -> dict[str, str | None] | None:
    """What became of each case, under its name, and the version; None without its environment."""
    made = environment(folder, client)
    if not made.exists():
        return None
    program = "node" if client.is_node else str(made.absolute() / "bin" / "python")
    done = subprocess.run(
        [program, HERE / client.file, url], cwd=made, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    told: dict[str, str | None] = {}
    for line in done.stdout.splitlines():
        if not line.startswith("{"):  # what a library says by itself
            continue
        item = json.loads(line)
        if "version" in item:
            told["version"] = item["version"]
        else:
            told[item["case"]] = item["error"]
    if not told:
        told["start"] = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
    return told


def table(results: dict[str, dict[str, str | None]]) -> str:
    """A row a client: what works, what fails, and what the client has no word for."""
    lines = ["| client | version | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, told in results.items():
        own = dict(told)
        if name in ANTHROPICS:
            own["Anthropic's messages"] = next(
                (error for case, error in told.items() if case != "version" and error), None
            )
        cells = [_cell(own, column) for column in COLUMNS]
        lines.append(f"| {name} | {told.get('version', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(told: dict[str, str | None], column: str) -> str:
    if column not in told:
        return ""
    return "yes" if told[column] is None else "no"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests clients", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    given = parser.parse_args()
    from server.family import make_family, start
    from server.tool_templates import HERMES

    results, failed = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        server = start(make_family(Path(folder)))
        server.service.engine.tokenizer("red").chat_template = HERMES
        try:
            for client in CLIENTS:
                if given.install:
                    install(given.folder, client)
                told = try_client(given.folder, client, server.url)
                if told is None:
                    print(f"{client.name}: no environment", file=sys.stderr)
                    continue
                results[client.name] = told
                wrong = {case: error for case, error in told.items() if case != "version" and error}
                failed += len(wrong)
                print(f"{client.name} {told.get('version', '')}: {wrong or 'all well'}", file=sys.stderr)
        finally:
            server.stop()
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
