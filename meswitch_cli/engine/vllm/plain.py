"""Artifacts in a vLLM that others start: `vllm serve BASE --enable-lora --lora-modules NAME=ARTIFACT`, or `vllm.LLM`.

vLLM's arguments do not tell its engine which adapters there will be, and slots are made before any is loaded. So what
they must hold is seen from `--lora-modules`, in the process that reads the command line.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.bank_layout import Layout, bank_layout
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.vllm.arguments import loading_arguments
from meswitch_cli.engine.vllm.artifacts import Files, check_artifact, is_artifact
from meswitch_cli.engine.vllm.names import CONFIG_KEY, WorkerConfig, base_names
from meswitch_cli.errors import ArtifactError, MeswitchError
from meswitch_cli.model.architecture import architecture
from meswitch_cli.model.tokenizer import end_ids, load_tokenizer
from meswitch_cli.model.weights import CheckpointWeights

logger = logging.getLogger(__name__)

#: Formats under which vLLM reads a checkpoint's safetensors, as our loader does.
LOAD_FORMATS = ("auto", "hf", "safetensors")
#: Bytes of copies of experts in each worker's host memory, unless `--additional-config` says otherwise.
HOST_BYTES = 4 << 30

#: In the process of an API server: chat templates by the name of the expert that brings one of its own.
_templates: dict[str, str] = {}
#: Likewise: what an expert's files were when it was loaded, by its name.
_files: dict[str, Files] = {}


def serve_artifacts() -> None:
    """Override what vLLM does with its arguments, with adapters that are loaded, with chats and with requests."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.input_processor import InputProcessor

    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config
    build_chat_params = ChatCompletionRequest.build_chat_params
    load_lora_adapter = OpenAIServingModels.load_lora_adapter
    unload_lora_adapter = OpenAIServingModels.unload_lora_adapter
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(from_cli_args)
    def with_modules(cls: Any, args: Any) -> Any:
        made = from_cli_args(cls, args)
        made.meswitch_paths = [Path(module.path) for module in getattr(args, "lora_modules", None) or []]
        return made

    @functools.wraps(create_engine_config)
    def with_slots(arguments: Any, *rest: Any, **options: Any) -> Any:
        context = rest[0] if rest else options.get("usage_context")
        prepare(arguments, getattr(arguments, "meswitch_paths", []), offline=context is UsageContext.LLM_CLASS)
        config = create_engine_config(arguments, *rest, **options)
        compile_on_cpu(config, arguments.enforce_eager)
        take_turns(config)
        return config

    @functools.wraps(build_chat_params)
    def with_own_template(request: Any, default_template: Any, *rest: Any, **options: Any) -> Any:
        return build_chat_params(request, _templates.get(request.model, default_template), *rest, **options)

    @functools.wraps(load_lora_adapter)
    async def load(models: Any, request: Any, *rest: Any, **options: Any) -> Any:
        answer = await load_lora_adapter(models, request, *rest, **options)
        path = Path(request.lora_path)
        if request.lora_name in models.lora_requests and is_artifact(path):
            _remember_template(request.lora_name, path)
            _files[request.lora_name] = Files.of(path)
        return answer

    @functools.wraps(unload_lora_adapter)
    async def unload(models: Any, request: Any) -> Any:
        answer = await unload_lora_adapter(models, request)
        if request.lora_name not in models.lora_requests:
            _templates.pop(request.lora_name, None)
            _files.pop(request.lora_name, None)
        return answer

    @functools.wraps(process_inputs)
    def with_own_ends(processor: Any, *rest: Any, **options: Any) -> Any:
        made = process_inputs(processor, *rest, **options)
        if made.lora_request is not None:
            refuse_changed(made.lora_request.lora_name, Path(made.lora_request.lora_path))
        if made.lora_request is not None and made.sampling_params is not None:
            add_ends(made.sampling_params, _ends_of_text(made.lora_request.lora_path))
        return made

    InputProcessor.process_inputs = with_own_ends
    EngineArgs.from_cli_args = classmethod(with_modules)
    EngineArgs.create_engine_config = with_slots
    ChatCompletionRequest.build_chat_params = with_own_template
    OpenAIServingModels.load_lora_adapter = load
    OpenAIServingModels.unload_lora_adapter = unload


def prepare(arguments: Any, paths: Iterable[Path], *, offline: bool = False) -> None:
    """Have vLLM's `EngineArgs` make slots for artifacts, where adapters are served and some are or may be artifacts.

    They may be where `paths` has one, where adapters may be loaded at any time or (`offline`, of `vllm.LLM`) come with
    requests, or where `--additional-config` has the key `meswitch`. Its value may hold `experts`, a list of further
    paths; `host_bytes`; `loras`: false has vLLM's layers serve artifacts alone, without what its LoRAs would cost; and
    `max_wait`, as `EngineSettings` has it, null for vLLM's own order.

    Raises:
        MeswitchError: an artifact among `paths` cannot be served, or vLLM's other arguments do not go with experts.
    """
    from vllm import envs

    asked = (arguments.additional_config or {}).get(CONFIG_KEY)
    if not arguments.enable_lora or (asked is not None and "layout" in asked):
        return
    wanted = [path for path in paths if is_artifact(path)] + [Path(path) for path in (asked or {}).get("experts", [])]
    if not wanted and asked is None and not offline and not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return
    try:
        _prepare(arguments, wanted, asked or {})
    except MeswitchError as error:
        if wanted or asked is not None:
            raise
        logger.warning("no artifacts can be loaded, LoRAs can: %s", error)


def compile_on_cpu(config: Any, eager: bool) -> None:
    """Have vLLM compile on a CPU as it does without adapters, where artifacts alone are served.

    It leaves compilation out for any adapter, because its LoRA operators for CPUs decide in Python what a step does.
    """
    from vllm import envs
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    asked = (config.additional_config or {}).get(CONFIG_KEY)
    if asked is None or asked["loras"] or eager or not current_platform.is_cpu():
        return
    compilation = config.compilation_config
    compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
    compilation.backend = "eager" if envs.VLLM_CPU_CI_ENV else "inductor"


def take_turns(config: Any) -> None:
    """Bound the wait for a slot, unless users bring a scheduler of their own or want vLLM's."""
    asked = (config.additional_config or {}).get(CONFIG_KEY)
    scheduler = config.scheduler_config
    if asked is None or asked["max_wait"] is None or scheduler.scheduler_cls is not None:
        return
    name = "AsyncTurnsScheduler" if scheduler.async_scheduling else "TurnsScheduler"
    scheduler.scheduler_cls = f"meswitch_cli.engine.vllm.scheduler.{name}"


def _prepare(arguments: Any, paths: Iterable[Path], asked: Mapping[str, Any]) -> None:
    unknown = asked.keys() - {"experts", "host_bytes", "loras", "max_wait"}
    if unknown:
        raise EngineError(
            f"--additional-config: meswitch has no {min(unknown)!r}, only experts, host_bytes, loras and max_wait"
        )
    max_wait = asked.get("max_wait", EngineSettings.max_wait)
    if max_wait is not None and (isinstance(max_wait, bool) or not isinstance(max_wait, int | float) or max_wait < 0):
        raise EngineError(f"--additional-config: max_wait must be seconds, 0 or more, or null, not {max_wait!r}")
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
        host_bytes=int(asked.get("host_bytes", HOST_BYTES)),
        loras=bool(asked.get("loras", True)),
        checked=False,
        fingerprint=fingerprint,
        max_wait=max_wait,
    )
    arguments.additional_config = {**(arguments.additional_config or {}), **config.additional_config()}
    loading = loading_arguments(base, described, names, names.vocabulary)
    loading["model_loader_extra_config"] = {
        **(arguments.model_loader_extra_config or {}),
        **loading["model_loader_extra_config"],
    }
    for name, value in loading.items():
        setattr(arguments, name, value)


def add_ends(params: Any, ends: Collection[int]) -> None:
    """Have vLLM's `SamplingParams` end a text at an expert's own ends too: vLLM knows the base's alone."""
    if params.ignore_eos:
        return
    params._all_stop_token_ids.update(ends)
    own = set(ends) - {params._eos_token_id}
    if own:
        params.stop_token_ids = sorted(own | set(params.stop_token_ids or ()))


def refuse_changed(name: str, path: Path) -> None:
    """Refuse a request for an expert whose files are no longer those that were loaded.

    It may be in no slot any more, and what cannot be read while a batch is made ends vLLM.

    Raises:
        VLLMValidationError: which vLLM answers with status 400.
    """
    from vllm.exceptions import VLLMValidationError

    known = _files.get(name)
    if known is not None and known != Files.of(path):
        raise VLLMValidationError(
            f"expert {name!r}: the files in {path} have changed since they were loaded; unload it, and load it by "
            "another name",
            parameter="model",
        )


@functools.cache
def _ends_of_text(adapter: str) -> frozenset[int]:
    """What ends an expert's text; nothing for a LoRA."""
    path = Path(adapter)
    return end_ids(path, load_tokenizer(path, ArtifactError)) if is_artifact(path) else frozenset()


def _remember_template(name: str, path: Path) -> None:
    """An expert's chats go by its own template: vLLM knows the base's alone."""
    template = getattr(load_tokenizer(path, ArtifactError), "chat_template", None)
    if isinstance(template, str):
        _templates[name] = template
