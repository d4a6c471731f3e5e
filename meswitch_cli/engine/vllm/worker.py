"""What the engine asks of vLLM's workers beyond vLLM's own calls; mixed into their class by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.engine.vllm.manager import ExpertManager
from meswitch_cli.engine.vllm.pooled_prompts import PooledPrompts


class WorkerExtension:
    """Called through `collective_rpc`."""

    model_runner: Any

    def meswitch_loads(self) -> tuple[float, int]:
        """Seconds and bytes of all copies into slots."""
        manager = self._manager()
        return manager.seconds, manager.nbytes

    def meswitch_take_in(self, path: str) -> None:
        """Make room for an artifact, as `ExpertManager.take_in`."""
        self._manager().take_in(Artifact.open(Path(path)))

    def meswitch_unpin(self, lora_id: int) -> None:
        """Let vLLM evict an expert again."""
        self._manager().unpin_adapter(lora_id)

    def meswitch_watch(self, request_id: str, layers_prefix: str, layer: int) -> None:
        """As `PooledPrompts.watch`."""
        runner = self.model_runner
        if not hasattr(runner, "meswitch_pooled"):
            runner.meswitch_pooled = PooledPrompts(runner, layers_prefix)
        runner.meswitch_pooled.watch(request_id, layer)

    def meswitch_take_mean(self, request_id: str) -> list[float]:
        """As `PooledPrompts.take`."""
        found: list[float] = self.model_runner.meswitch_pooled.take(request_id)
        return found

    def _manager(self) -> ExpertManager:
        manager: ExpertManager = self.model_runner.lora_manager._adapter_manager
        return manager
