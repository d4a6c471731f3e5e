"""The transformers versions whose continuous batching this engine was read against and tested with."""

from __future__ import annotations

from meswitch_cli.engine.contract import EngineError

#: From, and up to but not including. The engine overrides methods that transformers does not promise to keep.
SUPPORTED = ((5, 23), (5, 25))


def check_transformers(found: str | None = None) -> None:
    """Refuse a transformers that the engine does not know.

    Raises:
        EngineError: another version is installed.
    """
    if found is None:
        import transformers

        found = transformers.__version__
    if not SUPPORTED[0] <= release_of(found) < SUPPORTED[1]:
        low, high = (".".join(map(str, item)) for item in SUPPORTED)
        raise EngineError(
            f"transformers {found} is installed; the embedded engine needs >={low},<{high}: "
            f"pip install 'transformers>={low},<{high}'"
        )


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a package's version; zeros where it does not begin with two."""
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return 0, 0
