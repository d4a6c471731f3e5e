"""`meswitch chat`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "In this process": ("base", "expert", "router"),
    "Answers": ("system", "max_tokens", "temperature", "seed"),
    "Terminal": ("plain", "no_history"),
}

#: How long an answer may take to end when the conversation does: one that ended has left the engine by then, and one
#: that was broken off has been cancelled.
DRAIN_SECONDS = 5.0


def run(
    url: Annotated[
        str | None, typer.Option(help="A server to talk to.", show_default="http://127.0.0.1:8000, unless --base")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Serve this base in this process instead.", show_default="none")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="With --base: NAME=ARTIFACT. Repeatable.", show_default="none")
    ] = None,
    router: Annotated[Path | None, typer.Option(help="With --base: a router.", show_default="none")] = None,
    model: Annotated[
        str | None, typer.Option(help="Who answers.", show_default="auto with a router, else the first expert")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.", show_default="none")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this, print the answer, and end.", show_default="a conversation")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.", show_default="context")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 is greedy.", show_default="the model's own")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.", show_default="none")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="On a terminal too, print answers as they come, without Markdown.")
    ] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep no file of what was typed, for the next conversation.")
    ] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the server's key.", show_default="none")
    ] = None,
) -> None:
    """In a conversation, /expert NAME changes who answers, /new forgets what was said, /help names the rest.

    Example: meswitch chat --base ./llama --expert maths=./maths-1bit --prompt "What is 12 times 12?"
    """
    from meswitch_cli.commands.extras import require_extra

    require_extra("serve", "httpx2", *(("fastapi", "uvicorn", "prometheus_client") if base else ()))
    import sys

    from meswitch_cli.client.client import Endpoint
    from meswitch_cli.client.conversation import Conversation
    from meswitch_cli.commands.chat_lines import line_reader
    from meswitch_cli.commands.chat_talk import Talk
    from meswitch_cli.errors import MeswitchError, UsageError
    from meswitch_cli.server.settings import read_keys

    if url is not None and base is not None:
        raise UsageError("--url talks to a server, --base serves in this process: give one of them")
    if base is None and (expert or router):
        raise UsageError("--expert and --router go with --base")
    key = read_keys(api_key_file)[0] if api_key_file else None
    with _served(base, expert or [], router) as own:
        endpoint = Endpoint(own or url or "http://127.0.0.1:8000", key)
        names = [entry["id"] for entry in endpoint.models()]
        if not names:
            raise MeswitchError(f"{endpoint.url}: serves no model")
        conversation = Conversation(
            endpoint,
            model or ("auto" if "auto" in names else next((name for name in names if name != "base"), names[0])),
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        talk = Talk(conversation, names, markdown=not plain and sys.stdout.isatty())
        if prompt is not None:
            talk.answer(prompt)
        else:
            talk.run(line_reader(talk.words, keep=not no_history))


@contextmanager
def _served(base: str | None, experts: list[str], router: Path | None) -> Iterator[str | None]:
    """The address of a server in this process, on a free loopback port; None without a base."""
    if base is None:
        yield None
        return
    from meswitch_cli.commands.console import counted, working
    from meswitch_cli.commands.serve import check_router, load_router
    from meswitch_cli.engine.settings import EngineSettings
    from meswitch_cli.engine.transformers_engine import TransformersEngine
    from meswitch_cli.server.background import in_background
    from meswitch_cli.server.experts import named_experts, servable
    from meswitch_cli.server.service import Service
    from meswitch_cli.server.settings import ServerSettings

    named, _ = named_experts(experts)
    named, _ = servable(named, base, list(named))
    check_router(router, named)
    with working(f"loading {base} and {counted(len(named), 'expert')}"):
        engine = TransformersEngine(EngineSettings(base=base, experts=named, strict=True))
        try:
            engine.start()
            service = Service(engine, ServerSettings(drain_seconds=DRAIN_SECONDS), load_router(router, engine))
        except BaseException:
            engine.stop()
            raise
    with in_background(service) as address:
        yield address
