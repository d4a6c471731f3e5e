"""The engine's settings as vLLM's arguments."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.config import parsed_config
from meswitch_cli.engine.bank_layout import Layout
from meswitch_cli.engine.memory import CPU_CACHE_BYTES, token_bytes
from meswitch_cli.engine.sampling_ranges import MAX_TOP_LOGPROBS
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.vllm.names import BaseNames, WorkerConfig
from meswitch_cli.model.architecture import Architecture
from meswitch_cli.model.dtype import dtype_name

#: The name of our way of loading a base among vLLM's `load_format`s.
LOAD_FORMAT = "meswitch"
#: Adapters that vLLM may know at once. Ours are a path each; what host memory holds is bounded by bytes.
MAX_ADAPTERS = 4096
#: Prompts whose hidden states are computed at once, beside the requests.
POOLED_PROMPTS = 8
#: What vLLM reads from the environment alone. Its processes begin afresh, because this one has threads; the model
#: runner that calls logits processors; nobody is told what is served here; logs go where ours go.
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
}


def set_environment() -> None:
    """Set `ENVIRONMENT`, before vLLM is first imported."""
    os.environ.update(ENVIRONMENT)


def engine_arguments(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    described: Architecture,
    names: BaseNames,
    layout: Layout,
    *,
    slots: int,
    dtype: torch.dtype,
    max_model_len: int,
    seed: int,
) -> dict[str, Any]:
    """The arguments of `vllm.AsyncEngineArgs`."""
    added = max((capacity.added_rows for capacity in layout.capacities.values()), default=0)
    vocabulary = names.vocabulary + added
    # Norms are cheap, and a traced graph must find their tables where they were.
    config = WorkerConfig(layout=layout.joined(Layout({}, names.norms)), host_bytes=settings.host_bytes)
    options: dict[str, Any] = {
        "model": str(checkpoint.source.path),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "generation_config": "vllm",
        "dtype": dtype_name(dtype),
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_running + POOLED_PROMPTS,
        "max_num_batched_tokens": max(settings.max_batch_tokens, settings.max_running + POOLED_PROMPTS),
        "max_logprobs": MAX_TOP_LOGPROBS,
        "enable_prefix_caching": settings.prefix_sharing,
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        "data_parallel_size": settings.data_parallel,
        "async_scheduling": False,  # grammars follow the tokens that were chosen
        "disable_log_stats": True,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": max(MAX_ADAPTERS, slots),
        "max_lora_rank": 1,
        "use_tqdm_on_load": False,
        "additional_config": config.additional_config(),
        "worker_extension_cls": "meswitch_cli.engine.vllm.worker.WorkerExtension",
        "logits_processors": ["meswitch_cli.engine.vllm.grammar:GrammarProcessor"],
    }
    if added:
        options["hf_overrides"] = {"vocab_size": vocabulary}
    if settings.page_size is not None:
        options["block_size"] = settings.page_size
    options |= loading_arguments(checkpoint, described, names, vocabulary)
    return options | _cache_arguments(settings, checkpoint, dtype, max_model_len)


def loading_arguments(
    checkpoint: Checkpoint, described: Architecture, names: BaseNames, vocabulary: int
) -> dict[str, Any]:
    """How vLLM loads the base so that experts can be added to it; `vocabulary` are the rows of embedding and head."""
    stored = described.stored(checkpoint)
    rows = [f"{names.embedding_name}.weight", f"{names.head_name}.weight", f"{names.head_name}.bias"]
    extra = {"vocabulary": vocabulary, "names": sorted(stored[name].name for name in rows if name in stored)}
    return {"load_format": LOAD_FORMAT, "model_loader_extra_config": extra}


def _cache_arguments(
    settings: EngineSettings, checkpoint: Checkpoint, dtype: torch.dtype, max_model_len: int
) -> dict[str, Any]:
    """How much cache: as many tokens as were asked for; else on a GPU what vLLM finds free."""
    tokens = settings.cache_tokens
    if tokens is None and settings.torch_device.type != "cpu":
        return {}
    each = token_bytes(parsed_config(checkpoint.config), dtype.itemsize)
    if tokens is None:
        tokens = CPU_CACHE_BYTES // each
    page = settings.page_size or 128
    # One page more, because vLLM keeps one for itself.
    pages = math.ceil(max(tokens, max_model_len) / page) + 1
    return {"kv_cache_memory_bytes": pages * page * each}
