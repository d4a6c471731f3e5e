"""What vLLM calls in each of its processes: experts become a kind of adapter there.

Nothing changes for a vLLM that was not started by meswitch: it is recognised by its `additional_config`.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.names import CONFIG_KEY
from meswitch_cli.engine.vllm.version import check_vllm

logger = logging.getLogger(__name__)


def register() -> None:
    """The entry point of `vllm.general_plugins`; may be called more than once."""
    try:
        check_vllm()
    except EngineError as error:  # `VllmEngine` says so; a vLLM that others use must not stop for it
        logger.debug("%s", error)
        return
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from meswitch_cli.engine.vllm.loading import LOAD_FORMAT, BaseLoader

    if getattr(LoRAModelRunnerMixin.load_lora_model, "serves_experts", False):
        return
    register_model_loader(LOAD_FORMAT)(BaseLoader)
    _replace_kernels_once()
    load_lora_model = LoRAModelRunnerMixin.load_lora_model

    def load_model(runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if CONFIG_KEY not in (vllm_config.additional_config or {}):
            return load_lora_model(runner, model, vllm_config, device)
        from meswitch_cli.engine.vllm.manager import ExpertWorkerManager

        runner.lora_manager = ExpertWorkerManager(vllm_config, device, model.embedding_modules)
        return runner.lora_manager.create_lora_manager(model, vllm_config)

    load_model.serves_experts = True  # type: ignore[attr-defined]
    LoRAModelRunnerMixin.load_lora_model = load_model


def _replace_kernels_once() -> None:
    """Have vLLM replace its kernels once in a process, and not look into llvmlite for them.

    On a CPU it searches every module for kernels to replace. llvmlite's `lib`, there once Numba has been imported,
    answers to any attribute with a function of C, `__dict__` included, and the search fails on it.
    """
    from vllm.platforms import current_platform

    replace = current_platform.register_triton_kernel_overrides

    @functools.cache
    def replace_once() -> None:
        hidden = sys.modules.pop("llvmlite.binding.ffi", None)
        try:
            replace()
        finally:
            if hidden is not None:
                sys.modules["llvmlite.binding.ffi"] = hidden

    current_platform.register_triton_kernel_overrides = replace_once
