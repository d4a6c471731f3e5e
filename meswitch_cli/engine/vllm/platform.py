"""What vLLM does on a CPU that a server must not stumble over."""

from __future__ import annotations

import functools
import sys


def prepare_platform() -> None:
    """Change two things about vLLM's platform, on a CPU, before its samplers are imported. May be called again."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or getattr(current_platform, "serves_experts", False):
        return
    # vLLM compiles a few small functions as they are first called: C++, for half a minute, while everybody waits.
    current_platform.simple_compile_backend = "eager"
    replace = current_platform.register_triton_kernel_overrides

    @functools.cache
    def replace_once() -> None:
        # vLLM searches every module for kernels to replace. llvmlite's `lib`, there once Numba has been imported,
        # answers to any attribute with a function of C, `__dict__` included, and the search fails on it.
        hidden = sys.modules.pop("llvmlite.binding.ffi", None)
        try:
            replace()
        finally:
            if hidden is not None:
                sys.modules["llvmlite.binding.ffi"] = hidden

    current_platform.register_triton_kernel_overrides = replace_once
    current_platform.serves_experts = True
