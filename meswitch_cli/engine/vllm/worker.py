"""What the engine asks of vLLM's workers beyond vLLM's own calls; mixed into their class by name."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Called through `collective_rpc`."""

    model_runner: Any

    def meswitch_loads(self) -> tuple[float, int]:
        """Seconds and bytes of all copies into slots."""
        manager = self.model_runner.lora_manager._adapter_manager
        return manager.seconds, manager.nbytes

    def meswitch_unpin(self, lora_id: int) -> None:
        self.model_runner.lora_manager._adapter_manager.unpin_adapter(lora_id)
