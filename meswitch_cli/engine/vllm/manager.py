"""Experts as a kind of adapter among vLLM's: its slots, its order of eviction and its pins, our weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.batch import Batch, CurrentBatch
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.expert import expert_vocabulary
from meswitch_cli.engine.host_copies import HostCopies
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.vllm.names import CONFIG_KEY, layout_of
from meswitch_cli.engine.vllm.served_layers import serve_layers


class ExpertAdapter:
    """What vLLM keeps of an expert that has been asked for: where its artifact is. Weights are read when they are due.

    Attributes:
        id: vLLM's number of the adapter.
        artifact: None for one that vLLM makes up to try itself out, which changes nothing.
    """

    def __init__(self, adapter_id: int, artifact: Artifact | None = None) -> None:
        self.id, self.artifact = adapter_id, artifact


class ExpertManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """The slots of one worker. vLLM says who is to be active; this puts them there.

    Attributes:
        seconds, nbytes: of all copies into slots, reading from disk included where that was needed.
    """

    seconds: float = 0.0
    nbytes: int = 0

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        self.supports_mm = False
        self.punica_wrapper_mapping: dict[str, Any] = {}
        self._vllm_config = vllm_config

    def _create_lora_modules(self) -> None:
        config = self._vllm_config.additional_config[CONFIG_KEY]
        self.current = CurrentBatch()
        self._backend = kernels(self.device, self._vllm_config.model_config.dtype)
        self._base = Checkpoint.open(self._vllm_config.model_config.model)
        layers = serve_layers(self.model, self._base, self.current, self.lora_slots)
        self.banks = Banks(layers, layout_of(config), self.lora_slots)
        self.banks.install()
        self._limits = layers.limits.limits
        self._vocabulary = int(self._limits[0])
        self._copies = HostCopies(config["host_bytes"])

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> ExpertAdapter:
        return ExpertAdapter(lora_id)

    def _add_adapter(self, lora: ExpertAdapter) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        """Put a registered expert into a slot, if it is in none.

        Raises:
            ArtifactError: it cannot be read; its slot is empty then.
        """
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        with torch.inference_mode(False), torch.no_grad():
            self._copy(self._registered_adapters[lora_id], slot)
        self.lora_index_to_id[slot] = lora_id
        self._active_adapters[lora_id] = None
        return True

    def grow(self, config: Mapping[str, Any]) -> None:
        """Make slots that hold any expert of a larger layout, and move what is in a slot."""
        self.banks = Banks(self.banks.base, layout_of(config), self.lora_slots)
        with torch.inference_mode(False), torch.no_grad():
            for slot, lora_id in enumerate(self.lora_index_to_id):
                if lora_id is not None:
                    self._copy(self._registered_adapters.cache[lora_id], slot)
        self.banks.install()

    def unpin_adapter(self, lora_id: int) -> None:
        for cache in (self._registered_adapters, self._active_adapters):
            if lora_id in cache.pinned_items:
                cache._unpin(lora_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        self.unpin_adapter(adapter_id)
        adapter = self._registered_adapters.cache.get(adapter_id)
        if adapter is not None and adapter.artifact is not None:
            self._copies.forget(adapter.artifact.digest)
        removed: bool = super().remove_adapter(adapter_id)
        return removed

    def _set_adapter_mapping(self, mapping: Any) -> None:
        """Note the slot of every token and of every row of logits of the batch to come."""
        slots = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        tokens = [slots[item] if item else -1 for item in mapping.index_mapping]
        if max(tokens, default=-1) < 0:
            self.current.batch = None
            return
        rows = [slots[item] if item else -1 for item in mapping.prompt_mapping]
        of_token, of_row = (torch.tensor(item, dtype=torch.int32, device=self.device) for item in (tokens, rows))
        self.current.batch = Batch(of_token, of_row, self.lora_slots, self._backend)

    def _copy(self, adapter: ExpertAdapter, slot: int) -> None:
        if adapter.artifact is None:
            self.banks.load_base(slot)
            self._limits[slot + 1] = self._vocabulary
            return
        started = time.perf_counter()
        manifest, pinned = adapter.artifact.manifest, self.banks.base.device.type == "cuda"
        stored = self._copies.fetch(adapter.artifact.digest, adapter.artifact, pinned=pinned)
        self.nbytes += self.banks.load(slot, manifest, stored)
        self._limits[slot + 1] = expert_vocabulary(manifest, self._vocabulary)
        self.seconds += time.perf_counter() - started


class ExpertWorkerManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's manager of adapters, for artifacts."""

    _manager_cls = ExpertManager

    def _load_adapter(self, lora_request: Any) -> ExpertAdapter:
        """Open an artifact.

        Raises:
            ArtifactError: it is damaged.
            EngineError: it is not the one that was checked when it was taken in.
        """
        path = Path(lora_request.lora_path)
        artifact = Artifact.open(path)
        if artifact.digest != lora_request.lora_name.rpartition("@")[2]:
            raise EngineError(f"{path}: has changed since it was taken in; unload it and load it again")
        return ExpertAdapter(lora_request.lora_int_id, artifact)

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank
