"""Artifacts in a vLLM that others start: `vllm serve BASE --enable-lora --lora-modules NAME=ARTIFACT`, or `vllm.LLM`.

vLLM's arguments do not tell its engine which adapters there will be, and slots are made before any is loaded. So what
they must hold is seen from `--lora-modules`, in the process that reads the command line.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.banks import Layout, bank_layout
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.arguments import loading_arguments
from meswitch_cli.engine.vllm.artifacts import check_artifact, is_artifact
from meswitch_cli.engine.vllm.names import CONFIG_KEY, WorkerConfig, base_names
from meswitch_cli.errors import MeswitchError
from meswitch_cli.model.architecture import architecture
from meswitch_cli.model.weights import CheckpointWeights

logger = logging.getLogger(__name__)

#: Formats under which vLLM reads a checkpoint's safetensors, as our loader does.
LOAD_FORMATS = ("auto", "hf", "safetensors")
#: Bytes of copies of experts in each worker's host memory, unless `--additional-config` says otherwise.
HOST_BYTES = 4 << 30

#: In the process of an API server: chat templates by the name of the expert that brings one of its own.
_templates: dict[str, str] = {}


def serve_artifacts() -> None:
    """Override what vLLM does with its arguments, with adapters that are loaded, and with chats."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config
    build_chat_params = ChatCompletionRequest.build_chat_params
    load_lora_adapter = OpenAIServingModels.load_lora_adapter
    unload_lora_adapter = OpenAIServingModels.unload_lora_adapter

    @functools.wraps(from_cli_args)
    def with_modules(cls: Any, args: Any) -> Any:
        made = from_cli_args(cls, args)
        made.meswitch_paths = [Path(module.path) for module in getattr(args, "lora_modules", None) or []]
        return made

    @functools.wraps(create_engine_config)
    def with_slots(arguments: Any, *rest: Any, **options: Any) -> Any:
        prepare(arguments, getattr(arguments, "meswitch_paths", []))
        return create_engine_config(arguments, *rest, **options)

    @functools.wraps(build_chat_params)
    def with_own_template(request: Any, default_template: Any, *rest: Any, **options: Any) -> Any:
        return build_chat_params(request, _templates.get(request.model, default_template), *rest, **options)

    @functools.wraps(load_lora_adapter)
    async def load(models: Any, request: Any, *rest: Any, **options: Any) -> Any:
        answer = await load_lora_adapter(models, request, *rest, **options)
        path = Path(request.lora_path)
        if request.lora_name in models.lora_requests and is_artifact(path):
            _remember_template(request.lora_name, path)
        return answer

    @functools.wraps(unload_lora_adapter)
    async def unload(models: Any, request: Any) -> Any:
        answer = await unload_lora_adapter(models, request)
        if request.lora_name not in models.lora_requests:
            _templates.pop(request.lora_name, None)
        return answer

    EngineArgs.from_cli_args = classmethod(with_modules)
    EngineArgs.create_engine_config = with_slots
    ChatCompletionRequest.build_chat_params = with_own_template
    OpenAIServingModels.load_lora_adapter = load
    OpenAIServingModels.unload_lora_adapter = unload


def prepare(arguments: Any, paths: Iterable[Path]) -> None:
    """Have vLLM's `EngineArgs` make slots for artifacts, where adapters are served and some are or may be artifacts.

    They may be where `paths` has one, where adapters may be loaded at any time, or where `--additional-config` has the
    key `meswitch`, which may hold `experts`, a list of further paths, and `host_bytes`.

    Raises:
        MeswitchError: an artifact among `paths` cannot be served, or vLLM's other arguments do not go with experts.
    """
    from vllm import envs

    asked = (arguments.additional_config or {}).get(CONFIG_KEY)
    if not arguments.enable_lora or (asked is not None and "layout" in asked):
        return
    wanted = [path for path in paths if is_artifact(path)] + [Path(path) for path in (asked or {}).get("experts", [])]
    if not wanted and asked is None and not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return
    try:
        _prepare(arguments, wanted, (asked or {}).get("host_bytes", HOST_BYTES))
    except MeswitchError as error:
        if wanted or asked is not None:
            raise
        logger.warning("no artifacts can be loaded, LoRAs can: %s", error)


def _prepare(arguments: Any, paths: Iterable[Path], host_bytes: int) -> None:
    if arguments.load_format not in LOAD_FORMATS or arguments.quantization is not None:
        raise EngineError("experts need a base that vLLM loads from safetensors, without quantisation")
    base = Checkpoint.open(arguments.model)
    described = architecture(base.config, str(base.source.path))
    names = base_names(described)
    fingerprint = CheckpointWeights(base).fingerprint
    artifacts = [Artifact.open(path) for path in paths]
    for artifact in artifacts:
        check_artifact(artifact, base, fingerprint)
    layout = bank_layout(names, [artifact.manifest for artifact in artifacts])
    # Norms are cheap, and a traced graph must find their tables where they were.
    config = WorkerConfig(
        layout=layout.joined(Layout({}, names.norms)),
        host_bytes=host_bytes,
        loras=True,
        checked=False,
        fingerprint=fingerprint,
    )
    arguments.additional_config = {**(arguments.additional_config or {}), **config.additional_config()}
    loading = loading_arguments(base, described, names, names.vocabulary)
    loading["model_loader_extra_config"] = {
        **(arguments.model_loader_extra_config or {}),
        **loading["model_loader_extra_config"],
    }
    for name, value in loading.items():
        setattr(arguments, name, value)


def _remember_template(name: str, path: Path) -> None:
    """An expert's chats go by its own template: vLLM knows the base's alone."""
    from meswitch_cli.errors import ArtifactError
    from meswitch_cli.model.tokenizer import load_tokenizer

    template = getattr(load_tokenizer(path, ArtifactError), "chat_template", None)
    if isinstance(template, str):
        _templates[name] = template
