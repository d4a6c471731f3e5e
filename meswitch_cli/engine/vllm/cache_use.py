"""How much of vLLM's cache is in use, by what its schedulers report with each batch."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class CacheUse:
    """Blocks of the caches of all replicas of a base."""

    def __init__(self) -> None:
        #: Blocks and the part of them in use, by the number of a replica.
        self._caches: dict[int, tuple[int, float]] = {}

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """What vLLM reports to; a factory of its `stat_loggers`."""
        return _Reports(self._caches, vllm_config, engine_index)

    def blocks(self, busy: bool) -> tuple[int, int]:
        """All of them, and those that requests hold: none where none runs, of which no batch tells."""
        held = sum(round(blocks * used) for blocks, used in self._caches.values())
        return sum(blocks for blocks, _ in self._caches.values()), held if busy else 0


class _Reports(StatLoggerBase):  # type: ignore[misc]
    def __init__(self, caches: dict[int, tuple[int, float]], vllm_config: Any, engine_index: int) -> None:
        self._caches, self._config, self._index = caches, vllm_config, engine_index

    def log_engine_initialized(self) -> None:
        # vLLM adds up the blocks of all replicas; one of each stands for none.
        blocks = (self._config.cache_config.num_gpu_blocks or 0) // self._config.parallel_config.data_parallel_size
        self._caches[self._index] = (max(blocks - 1, 0), 0.0)

    def record(self, scheduler_stats: Any, *rest: Any, **options: Any) -> None:
        if scheduler_stats is not None:
            self._caches[self._index] = (self._caches[self._index][0], float(scheduler_stats.kv_cache_usage))
