"""`meswitch serve`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch_cli.addresses import in_url
from meswitch_cli.commands.config_file import take_config
from meswitch_cli.commands.console import counted, working
from meswitch_cli.names import GateMode

if TYPE_CHECKING:
    from socket import socket

    from meswitch_cli.engine.contract import Engine
    from meswitch_cli.engine.slotted_engine import SlottedEngine
    from meswitch_cli.router import Router
    from meswitch_cli.server.settings import ServerSettings

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "Router": ("router", "gate", "feedback", "router_strict"),
    "Network and keys": ("host", "port", "api_key_file", "admin_key_file", "cors_origin"),
    "Limits": ("max_queue", "max_running", "max_model_len", "max_n", "max_body", "drain_seconds"),
    "Device and memory": ("engine", "device", "dtype", "slots", "cache_tokens", "prefix_sharing"),
    "Several devices": ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "replicas"),
    "Log": ("log_level", "log_format", "log_prompts"),
}


def run(
    base: Annotated[str, typer.Option(help="The base that the experts share: a folder, or a Hub id.")],
    expert: Annotated[
        list[str] | None, typer.Option(help="NAME=ARTIFACT: an expert, and the name that requests give. Repeatable.")
    ] = None,
    experts_dir: Annotated[
        Path | None,
        typer.Option(help="Serve each artifact in this folder by its folder's name; more may be loaded from it later."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=take_config, is_eager=True, help="A .yaml or .toml file with any of these options by name."
        ),
    ] = None,
    router: Annotated[
        Path | None, typer.Option(help='A router of `meswitch train-router`; makes the model "auto".')
    ] = None,
    gate: Annotated[
        GateMode | None,
        typer.Option(
            help="How much the router refuses; x-meswitch-gate asks for another.", show_default="the router's"
        ),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(
            help="Append to this file who should have answered, for `router add --feedback`.", show_default="no"
        ),
    ] = None,
    router_strict: Annotated[
        bool, typer.Option("--router-strict", help="A router that fails is an error, not an answer of the base.")
    ] = False,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts on the device at once.", show_default="all of them")
    ] = None,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"],
        typer.Option(help="auto is transformers; vllm needs an environment of its own, with meswitch[vllm] in it."),
    ] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="GPUs that share each layer of one model; more than one with --engine vllm.")
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option(min=1, help="GPUs that share out the layers; more than one with --engine vllm.")
    ] = 1,
    data_parallel_size: Annotated[
        int,
        typer.Option(min=1, help="Copies of the base, on GPUs of their own; more than one with --engine vllm."),
    ] = 1,
    replicas: Annotated[
        int,
        typer.Option(min=1, help="Servers behind one address: base and experts each, and GPUs of its own."),
    ] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that requests need, one a line.", show_default="no key is needed")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Keys that may load, unload and pin experts.", show_default="nobody may")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call this server from a browser. Repeatable.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; beyond, 503 with Retry-After.")] = 256,
    max_running: Annotated[int, typer.Option(min=1, help="Requests in one batch.")] = 32,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer together.", show_default="the model's, at most 8192"),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the key-value cache holds.", show_default="by device and model"),
    ] = None,
    prefix_sharing: Annotated[
        bool,
        typer.Option(
            "--prefix-sharing/--no-prefix-sharing", help="Requests of one expert share the cache of equal beginnings."
        ),
    ] = True,
    max_n: Annotated[int, typer.Option(min=1, help="Largest n, the choices of one request.")] = 16,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request body, in bytes.")] = 4 << 20,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="How long running requests may take after a first SIGTERM.")
    ] = 60,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the base's weights; auto: its own.")
    ] = "auto",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="From where to log.")
    ] = "info",
    log_format: Annotated[
        Literal["auto", "console", "json"], typer.Option(help="auto: console on a terminal, JSON elsewhere.")
    ] = "auto",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
) -> None:
    """All of them share one copy of the base. The page is at /; curl and OpenAI's clients find the API at /v1.

    Example: meswitch serve --base ./llama --expert maths=./maths-1bit --expert code=./code-1bit --router ./router
    """
    from meswitch_cli.commands.extras import require_extra

    require_extra("vllm" if engine == "vllm" else "serve", "fastapi", "uvicorn", "prometheus_client")
    from meswitch_cli.server.experts import named_experts, servable
    from meswitch_cli.server.settings import ServerSettings, read_keys, read_origin

    experts, refused = named_experts(expert or (), experts_dir)
    settings = ServerSettings(
        api_keys=read_keys(api_key_file) if api_key_file else (),
        admin_keys=read_keys(admin_key_file) if admin_key_file else (),
        cors_origins=tuple(map(read_origin, cors_origin or ())),
        experts_dir=experts_dir,
        max_body_bytes=max_body,
        max_choices=max_n,
        drain_seconds=drain_seconds,
        router_strict=router_strict,
        feedback=feedback,
        log_prompts=log_prompts,
    )

    from meswitch_cli.engine.settings import EngineSettings
    from meswitch_cli.server.app import create_app
    from meswitch_cli.server.lifecycle import Server, listen, serve
    from meswitch_cli.server.logs import configure_logging
    from meswitch_cli.server.service import Service

    with ExitStack() as undo:
        bound = listen(host, port)
        undo.callback(bound.close)
        configure_logging(log_level, log_format)
        if replicas > 1:
            gpus = tensor_parallel_size * pipeline_parallel_size * data_parallel_size
            _serve_replicas(bound, replicas, device, gpus, settings, host)
            return
        experts, unfit = servable(experts, base, [pair.partition("=")[0] for pair in expert or ()])
        check_router(router, experts)
        if experts_dir is not None and not experts and not refused:
            _note(f"warning: no artifact in {experts_dir}: the base alone is served until one is loaded from there")
        with working(f"loading {base} and {counted(len(experts), 'expert')}"):
            made = _engine_class(engine)(
                EngineSettings(
                    base=base,
                    experts=experts,
                    slots=slots,
                    device=device,
                    dtype=dtype,
                    max_model_len=max_model_len,
                    max_queue=max_queue,
                    max_running=max_running,
                    cache_tokens=cache_tokens,
                    prefix_sharing=prefix_sharing,
                    tensor_parallel=tensor_parallel_size,
                    pipeline_parallel=pipeline_parallel_size,
                    data_parallel=data_parallel_size,
                )
            )
            undo.callback(made.stop)
            made.start()
            _warn_of(refused | unfit | made.failed)
            chosen = load_router(router, made, gate)
        service = Service(made, settings, chosen)
        address = f"http://{in_url(host)}:{bound.getsockname()[1]}"
        _warn_if_open(settings, host)
        server = Server(create_app(service), service, on_started=lambda: _welcome(address, service.experts(), chosen))
        undo.pop_all()
    serve(server, bound)


def _serve_replicas(bound: socket, count: int, device: str, gpus: int, settings: ServerSettings, host: str) -> None:
    """A front on a bound socket, and behind it this very command, `count` times, with so many GPUs each."""
    import sys

    import torch

    from meswitch_cli.server.replicas.server import environments, replica_arguments, serve_replicas

    extra = environments(count, device, torch.cuda.device_count(), gpus)
    _warn_if_open(settings, host)
    port = bound.getsockname()[1]
    serve_replicas(
        bound,
        replica_arguments(sys.argv[sys.argv.index("serve") + 1 :]),
        extra,
        max_body_bytes=settings.max_body_bytes,
        drain_seconds=settings.drain_seconds,
        on_started=lambda: _note(f"{count} replicas are starting behind http://{in_url(host)}:{port}"),
    )


def _warn_if_open(settings: ServerSettings, host: str) -> None:
    if settings.is_open(host):
        _note("warning: everybody who reaches this address may use it; --api-key-file asks for a key")


def _engine_class(name: str) -> type[SlottedEngine[Any]]:
    if name == "vllm":
        from meswitch_cli.engine.vllm.engine import VllmEngine

        return VllmEngine
    from meswitch_cli.engine.transformers_engine import TransformersEngine

    return TransformersEngine


def check_router(path: Path | None, experts: Mapping[str, object]) -> None:
    """Refuse, before anything is loaded, a folder that is no router, or one that can choose an expert not served."""
    if path is None:
        return
    from meswitch_cli.router.store import RouterArtifact
    from meswitch_cli.router.store.membership import TrainedFor, check_membership
    from meswitch_cli.server.routing import POLICY

    labels = TrainedFor(RouterArtifact.open(path).manifest.experts)
    check_membership(labels, experts=dict.fromkeys(experts), policy=POLICY)


def load_router(path: Path | None, engine: Engine, gate: GateMode | None = None) -> Router | None:
    """The router of a folder, once it is known to belong to the engine's base and experts; None without a folder."""
    if path is None:
        return None
    from meswitch_cli.commands.progress import quiet_loading
    from meswitch_cli.server.routing import open_served_router

    quiet_loading()
    return open_served_router(path, engine, lambda warning: _note(f"warning: {warning}"), gate)


def _warn_of(refused: Mapping[str, str]) -> None:
    for name, reason in refused.items():
        _note(f"warning: expert {name} is not served: {reason}")


def _welcome(address: str, experts: Mapping[str, object], router: Router | None) -> None:
    model = "auto" if router else next(iter(sorted(experts)), "base")
    names = ", ".join((*sorted(experts), "base", *(("auto",) if router else ())))
    _note(
        f"serving {names}\n"
        f"page    {address}/\n"
        f"try     curl {address}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'          -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 12 times 12?"}}]}}\''
    )


def _note(text: str) -> None:
    typer.echo(text, err=True)
