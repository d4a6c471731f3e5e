"""Experts as a kind of adapter among vLLM's: its slots, its order of eviction and its pins, our weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.bank_layout import Layout, bank_layout
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.expert import expert_vocabulary
from meswitch_cli.engine.host_copies import HostCopies
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.settings import copies_nbytes
from meswitch_cli.engine.vllm.announced import AnnouncedTokens
from meswitch_cli.engine.vllm.artifacts import check_artifact, is_artifact
from meswitch_cli.engine.vllm.layers import VocabularyLimits
from meswitch_cli.engine.vllm.names import WorkerConfig
from meswitch_cli.engine.vllm.platform import spare_base_tokens
from meswitch_cli.engine.vllm.served_layers import FoundLayers, limit_vocabulary
from meswitch_cli.engine.vllm.shards import ShardedBanks


class ExpertAdapter:
    """What vLLM keeps of an expert that has been asked for: where its artifact is. Weights are read when they are due.

    Attributes:
        id: vLLM's number of the adapter.
        artifact: None for one that vLLM makes up to try itself out, which changes nothing.
    """

    def __init__(self, adapter_id: int, artifact: Artifact | None = None) -> None:
        self.id, self.artifact = adapter_id, artifact


@contextmanager
def outside_inference() -> Iterator[None]:
    """Make and write tensors as outside of a step of vLLM's: what is made within one can be written there alone."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class ExpertManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """The slots of one worker, experts' and LoRAs'. vLLM says who is to be active; this puts experts there.

    A slot holds one or the other: tokens of an expert have no LoRA to vLLM's layers, those of a LoRA no expert to ours.

    Attributes:
        seconds, nbytes: of all copies into slots, reading from disk included where that was needed.
    """

    seconds: float = 0.0
    nbytes: int = 0
    #: Numbers of the adapters that vLLM tries itself out with, while it does.
    trials: frozenset[int] = frozenset()

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        self.config = WorkerConfig.of(vllm_config.additional_config)
        if self.config.loras:
            super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        else:
            self.supports_mm = False
            self.punica_wrapper_mapping: dict[str, Any] = {}

    def _create_lora_modules(self) -> None:
        model_config = self._vllm_config.model_config
        backend = kernels(self.device, model_config.dtype)
        base = Checkpoint.open(model_config.model)
        found = FoundLayers(self.model, base)
        # vLLM pads batches to the sizes of its graphs.
        most = max(self.max_num_batched_tokens, *(self._vllm_config.compilation_config.cudagraph_capture_sizes or [0]))
        self.announced = AnnouncedTokens(self.lora_slots, most, most, self.device, backend)
        self._layers = layers = found.serve(self.announced, backend, self.device, model_config.dtype)
        if self.config.loras:
            if current_platform.is_cpu():
                spare_base_tokens()
            super()._create_lora_modules()
        limits = VocabularyLimits(found.names.vocabulary, self.lora_slots, self.announced, self.device)
        limit_vocabulary(self.model, limits)
        self._limits, self._vocabulary = limits.limits, found.names.vocabulary
        self._names = found.names
        self.layout = self.config.layout
        self.banks = ShardedBanks(layers, layers.own(self.layout), self.lora_slots)
        self.banks.install()
        parallel, host_bytes = self._vllm_config.parallel_config, self.config.host_bytes
        if host_bytes is None:
            host_bytes = copies_nbytes(self.device, parallel.world_size * parallel.data_parallel_size_local)
        self._copies = HostCopies(host_bytes, base)
        self.base = base

    @property
    def rows_may_move(self) -> bool:
        """Whether slots can still be made larger: a captured graph reads them where they are."""
        graphs = self._vllm_config.compilation_config.cudagraph_mode
        return current_platform.is_cpu() or (not graphs.has_piecewise_cudagraphs() and not graphs.has_full_cudagraphs())

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> Any:
        """What vLLM tries itself out with: an expert that changes nothing, and a LoRA, in one slot."""
        if not self.config.loras:
            return ExpertAdapter(lora_id)
        return super().create_dummy_lora(lora_id, rank, embedding_modules)

    def _add_adapter(self, lora: Any) -> None:
        if isinstance(lora, ExpertAdapter):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Put a registered expert or LoRA into a slot, if it is in none.

        Raises:
            ArtifactError: it cannot be read; its slot is empty then.
        """
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        adapter = self._registered_adapters.cache[lora_id]
        if not isinstance(adapter, ExpertAdapter):
            activated: bool = super().activate_adapter(lora_id)
            if lora_id in self.trials:
                self._copy(ExpertAdapter(lora_id), self.lora_index_to_id.index(lora_id))
            return activated
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        self._copy(adapter, slot)
        self.lora_index_to_id[slot] = lora_id
        self._active_adapters[lora_id] = None
        return True

    def take_in(self, artifact: Artifact) -> None:
        """Make room for an expert that is to be loaded.

        Raises:
            EngineError: the slots are too small, and captured graphs read them where they are.
        """
        layout = bank_layout(self._names, [artifact.manifest])
        if self.layout.holds(layout):
            return
        if not self.rows_may_move:
            raise EngineError(
                f"{artifact.path}: vLLM's CUDA graphs were captured with slots too small for this expert; name it (or "
                "one made with the same settings) when vLLM starts, in --lora-modules or meswitch's experts of "
                "--additional-config"
            )
        self.grow(self.layout.joined(layout))

    @outside_inference()
    def grow(self, layout: Layout) -> None:
        """Make slots that hold any expert of a larger layout, and move what is in a slot."""
        old = self.banks
        self.layout = layout
        self.banks = ShardedBanks(self._layers, self._layers.own(layout), self.lora_slots)
        if self.banks.gains.keys() == old.gains.keys():  # a traced graph reads these where they are
            self.banks.gains, self.banks.shifts = old.gains, old.shifts
        for slot, lora_id in enumerate(self.lora_index_to_id):
            adapter = None if lora_id is None else self._registered_adapters.cache[lora_id]
            if isinstance(adapter, ExpertAdapter):
                self._copy(adapter, slot)
        self.banks.install()

    def unpin_adapter(self, lora_id: int) -> None:
        for cache in (self._registered_adapters, self._active_adapters):
            if lora_id in cache.pinned_items:
                cache._unpin(lora_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        self.unpin_adapter(adapter_id)
        adapter = self._registered_adapters.cache.get(adapter_id)
        if isinstance(adapter, ExpertAdapter) and adapter.artifact is not None:
            self._copies.forget(adapter.artifact.digest)
        removed: bool = super().remove_adapter(adapter_id)
        return removed

    def _set_adapter_mapping(self, mapping: Any) -> None:
        """Note the slot of every token and of every row of logits of the batch to come."""
        if self.config.loras:
            super()._set_adapter_mapping(self._of_loras(mapping))
        if mapping.type == LoRAMappingType.LANGUAGE:
            slots = {item: slot for slot, item in enumerate(self.lora_index_to_id) if item and self._is_expert(item)}
            of_token, of_row = (
                [slots.get(item, -1) for item in items] for items in (mapping.index_mapping, mapping.prompt_mapping)
            )
            self.announced.announce(of_token, of_row)

    def _of_loras(self, mapping: Any) -> Any:
        """A mapping without the experts that are no LoRAs."""
        experts = {item for item in self.lora_index_to_id if item and self._is_expert(item)} - self.trials
        if not experts:
            return mapping
        tokens, prompts = (
            tuple(0 if item in experts else item for item in items)
            for items in (mapping.index_mapping, mapping.prompt_mapping)
        )
        return LoRAMapping(tokens, prompts, mapping.is_prefill, mapping.type)

    def _is_expert(self, lora_id: int) -> bool:
        return lora_id in self.trials or isinstance(self._registered_adapters.cache.get(lora_id), ExpertAdapter)

    @outside_inference()
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
    """vLLM's manager of adapters, for artifacts beside LoRAs."""

    _manager_cls = ExpertManager

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: What was first found at a path under a name: vLLM's cached blocks are keyed by these two.
        self._digests: dict[tuple[str, str], str] = {}

    def _load_adapter(self, lora_request: Any) -> Any:
        """Open an artifact, or have vLLM load a LoRA.

        Raises:
            ArtifactError: it is damaged, or was made against another base.
            EngineError: it cannot be served here, or is not the one that was checked when it was taken in.
        """
        manager: ExpertManager = self._adapter_manager
        path = Path(lora_request.lora_path)
        if not is_artifact(path):
            if not manager.config.loras:
                raise EngineError(f"{path}: is no artifact; vLLM's own LoRAs are served by `vllm serve`")
            return super()._load_adapter(lora_request)
        artifact = Artifact.open(path)
        known = self._digests.get((lora_request.lora_name, lora_request.lora_path))
        if manager.config.checked:
            known = lora_request.lora_name.rpartition("@")[2]
        elif known is None:
            check_artifact(artifact, manager.base, manager.config.fingerprint)
        if known is not None and known != artifact.digest:
            raise EngineError(
                f"{path}: has changed since it was taken in as {lora_request.lora_name.partition('@')[0]!r}, and what "
                "was computed then is still cached: unload it, and load this one from another folder or by another name"
            )
        manager.take_in(artifact)
        self._digests[lora_request.lora_name, lora_request.lora_path] = artifact.digest
        return ExpertAdapter(lora_request.lora_int_id, artifact)

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        self._adapter_manager.trials |= {lora_request.lora_int_id}
        added: bool = super().add_dummy_lora(lora_request, rank)
        return added

    def remove_all_adapters(self) -> None:
        self._adapter_manager.trials = frozenset()
        super().remove_all_adapters()

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        if not self._adapter_manager.config.loras:
            return default_rank
        rank: int = super().get_dummy_lora_warmup_rank(default_rank)
        return rank
