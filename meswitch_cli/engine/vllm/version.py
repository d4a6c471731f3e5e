"""The vLLM versions whose adapters, workers and layers this engine was read against and tested with."""

from __future__ import annotations

from importlib.util import find_spec

from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.version import release_of

#: From, and up to but not including. The plugin overrides methods that vLLM does not promise to keep.
SUPPORTED = ((0, 32), (0, 34))
INSTALL = "pip install 'meswitch[vllm]' in an environment of its own (on a machine without a GPU: see docs/vllm.md)"


def check_vllm(found: str | None = None) -> None:
    """Refuse to start without a vLLM that the engine knows; `found` stands in for the installed version.

    Raises:
        EngineError: it is not installed, or of another version.
    """
    low, high = (".".join(map(str, item)) for item in SUPPORTED)
    if found is None:
        if find_spec("vllm") is None:
            raise EngineError(f"--engine vllm needs vLLM >={low},<{high}, which is not installed: {INSTALL}")
        import vllm

        found = str(vllm.__version__)
    if not SUPPORTED[0] <= release_of(found) < SUPPORTED[1]:
        raise EngineError(f"vLLM {found} is installed; --engine vllm needs >={low},<{high}: {INSTALL}")
