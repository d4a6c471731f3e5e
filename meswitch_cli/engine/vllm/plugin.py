"""What vLLM calls in each of its processes: experts become a kind of adapter there.

Nothing changes for a vLLM that is not to serve artifacts; one that is, is recognised by its `additional_config`, which
`VllmEngine` or, in a vLLM that others start, `plain` writes.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.names import CONFIG_KEY
from meswitch_cli.engine.vllm.parent import end_with_parent, tell_of_exceptions, tell_parent
from meswitch_cli.engine.vllm.version import check_vllm
from meswitch_cli.errors import MeswitchError

logger = logging.getLogger(__name__)

#: What is overridden or called of vLLM though it does not promise to keep it: a module, and a class's members there.
SYMBOLS = (
    ("vllm.engine.arg_utils", "EngineArgs", ("from_cli_args", "create_engine_config")),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest", ("build_chat_params",)),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", ("load_lora_adapter", "unload_lora_adapter")),
    ("vllm.v1.engine.input_processor", "InputProcessor", ("process_inputs",)),
    ("vllm.v1.engine.async_llm", "AsyncLLM", ("add_lora", "pin_lora", "remove_lora", "collective_rpc", "errored")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", ("_model_forward",)),
    ("vllm.config.scheduler", "SchedulerConfig", ("scheduler_cls", "async_scheduling")),
    ("vllm.v1.core.sched.scheduler", "Scheduler", ("schedule", "_handle_blocked_waiting_request")),
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", ("schedule", "_handle_blocked_waiting_request")),
    ("vllm.forward_context", "ForwardContext", ("skip_compiled",)),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin", ("load_lora_model",)),
    (
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager",
        (
            "_init_punica_wrapper", "_create_lora_modules", "create_dummy_lora", "_add_adapter", "activate_adapter",
            "_set_adapter_mapping", "remove_adapter", "remove_all_adapters", "pin_adapter",
        ),
    ),
    (
        "vllm.lora.worker_manager",
        "LRUCacheWorkerLoRAManager",
        ("_load_adapter", "add_dummy_lora", "remove_all_adapters", "get_dummy_lora_warmup_rank"),
    ),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader", ("get_all_weights", "load_weights")),
)  # fmt: skip


def register() -> None:
    """The entry point of `vllm.general_plugins`; may be called more than once."""
    try:
        check_vllm()
        check_symbols()
    except EngineError as error:  # `VllmEngine` says so; a vLLM that others use must not stop for it
        logger.warning("experts cannot be served: %s", error)
        return
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models import supports_lora
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from meswitch_cli.engine.vllm.arguments import LOAD_FORMAT
    from meswitch_cli.engine.vllm.loading import BaseLoader
    from meswitch_cli.engine.vllm.plain import serve_artifacts
    from meswitch_cli.engine.vllm.platform import hide_llvmlite

    if getattr(LoRAModelRunnerMixin.load_lora_model, "serves_experts", False):
        return
    end_with_parent()
    tell_of_exceptions()
    hide_llvmlite()
    serve_artifacts()
    register_model_loader(LOAD_FORMAT)(BaseLoader)
    load_lora_model = LoRAModelRunnerMixin.load_lora_model

    def load_model(runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if CONFIG_KEY not in (vllm_config.additional_config or {}):
            return load_lora_model(runner, model, vllm_config, device)
        from meswitch_cli.engine.vllm.manager import ExpertWorkerManager
        from meswitch_cli.engine.vllm.platform import give_memory_between_stages

        try:
            if not supports_lora(model):
                raise EngineError(f"vLLM serves no adapters of {type(model).__name__}; use --engine transformers")
            give_memory_between_stages(runner, model)
            runner.lora_manager = ExpertWorkerManager(vllm_config, device, model.embedding_modules)
            return runner.lora_manager.create_lora_manager(model, vllm_config)
        except Exception as error:
            tell_parent(str(error) if isinstance(error, MeswitchError) else f"{type(error).__name__}: {error}")
            raise

    load_model.serves_experts = True  # type: ignore[attr-defined]
    LoRAModelRunnerMixin.load_lora_model = load_model


def check_symbols() -> None:
    """Refuse a vLLM that lacks what is overridden here.

    Raises:
        EngineError: naming the first that is missing.
    """
    for module, name, members in SYMBOLS:
        try:
            found = getattr(importlib.import_module(module), name)
            for member in members:
                getattr(found, member)
        except (ImportError, AttributeError) as error:
            raise EngineError(f"this vLLM has changed: {module}.{name}: {error}") from error
