"""What vLLM calls in each of its processes: experts become a kind of adapter there.

Nothing changes for a vLLM that was not started by meswitch: it is recognised by its `additional_config`.
"""

from __future__ import annotations

import logging
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
    load_lora_model = LoRAModelRunnerMixin.load_lora_model

    def load_model(runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if CONFIG_KEY not in (vllm_config.additional_config or {}):
            return load_lora_model(runner, model, vllm_config, device)
        from meswitch_cli.engine.vllm.manager import ExpertWorkerManager

        runner.lora_manager = ExpertWorkerManager(vllm_config, device, model.embedding_modules)
        return runner.lora_manager.create_lora_manager(model, vllm_config)

    load_model.serves_experts = True  # type: ignore[attr-defined]
    LoRAModelRunnerMixin.load_lora_model = load_model
