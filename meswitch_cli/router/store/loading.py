"""From a folder to a router that answers, once it is known to belong where it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from meswitch_cli.router.backends.base import FolderBase, ReadableBase
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store.artifact import RouterArtifact
from meswitch_cli.router.store.membership import ALONE, Policy, check_membership


def open_router(
    router: Path | RouterArtifact,
    base: ReadableBase | str | None = None,
    experts: Mapping[str, str | None] | None = None,
    policy: Policy = ALONE,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Router:
    """Open a router.

    Args:
        router: its folder.
        base: folder, Hub id, or a base in memory; a probe reads it, and the other backends do without.
        experts: those that it is to choose between, as `check_membership` takes them.

    Raises:
        RouterError: it is no router, damaged, of another version, or does not belong to this base and these experts.
    """
    artifact = RouterArtifact.open(router) if isinstance(router, Path) else router
    given = FolderBase(base) if isinstance(base, str) else base
    for warning in check_membership(artifact.manifest.trained_for, given, experts, policy):
        on_warning(warning)
    return artifact.router(given)
