"""What vLLM does on a CPU that a server must not stumble over."""

from __future__ import annotations

import functools
import sys
from typing import Any


def hide_llvmlite() -> None:
    """Keep vLLM's search for Triton kernels to replace away from llvmlite. May be called again.

    vLLM searches every module. llvmlite's `lib`, there once Numba has been imported, answers to any attribute with a
    function of C, `__dict__` included, and the search fails on it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or "serves_experts" in vars(current_platform):
        return
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
    current_platform.serves_experts = True


def spare_base_tokens() -> None:
    """Keep vLLM's LoRAs away from tokens that have none, on a CPU. May be called again.

    Its operators there take the index -1, which stands for no LoRA, for the last slot's.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if getattr(lora_ops.bgmv_shrink, "spares_base_tokens", False):
        return
    shrink = lora_ops.bgmv_shrink

    def spared(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output[(indices < 0).expand(output.shape[0])] = 0  # one index may stand for all rows

    spared.spares_base_tokens = True  # type: ignore[attr-defined]
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = spared


def give_memory_between_stages(runner: Any, model: Any) -> None:
    """Make the tensors that a stage of a pipeline takes from the one before, on a CPU.

    vLLM makes them as it tries the model out, which it leaves out there for a model that is not compiled.
    """
    from vllm.distributed import get_pp_group
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or get_pp_group().is_first_rank:
        return
    if getattr(runner, "intermediate_tensors", None) is None:
        runner.intermediate_tensors = model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
