"""Whether a router belongs to a base and to experts: one answer, whoever asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from meswitch_cli.checkpoint.fingerprint import short_fingerprint
from meswitch_cli.errors import MeswitchError, RouterError
from meswitch_cli.router.backends.base import ReadableBase


@dataclass(frozen=True)
class TrainedFor:
    """What a router was trained for.

    Attributes:
        experts: label to SHA-256 of the artifact's manifest, None where it was not known in training.
        base_id, base_fingerprint: of the base whose hidden states it reads; None where its backend reads none.
    """

    experts: Mapping[str, str | None]
    base_id: str | None = None
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class Policy:
    """What differs between those who ask. Another base is an error everywhere.

    Attributes:
        place: where the experts are, as messages call it.
        add_expert: what a user does who wants the missing expert there; `{name}` stands for its name.
        missing_expert: the error where the router can choose an expert that is not there.
        another_artifact: whether an expert that was compressed anew since is an error, or a warning.
    """

    place: str
    add_expert: str
    missing_expert: type[MeswitchError] = RouterError
    another_artifact: Literal["error", "warning"] = "error"


#: For commands that have no experts at hand, only the base.
ALONE = Policy("this command", "give {name}")


def check_membership(
    trained_for: TrainedFor,
    base: ReadableBase | None = None,
    experts: Mapping[str, str | None] | None = None,
    policy: Policy = ALONE,
) -> list[str]:
    """Check that a router goes with a base and experts.

    Args:
        base: None where none is given; its fingerprint is asked for only where the router has one to compare.
        experts: name to SHA-256 of the artifact's manifest, None where that is not known; None: nothing to compare.

    Returns:
        What is worth a warning.

    Raises:
        RouterError: the router reads a base and none is given, or another one; an expert's artifact is another one.
        MeswitchError: of the policy's kind, an expert is missing.
    """
    wanted = trained_for.base_fingerprint
    if wanted is not None:
        if base is None:
            raise RouterError(
                f"the router reads the hidden states of its base ({trained_for.base_id}): give the base it was "
                "trained on (--base)"
            )
        found = base.fingerprint
        if found is not None and found != wanted:
            raise RouterError(
                f"the router was made for another base: {base.name} has fingerprint {short_fingerprint(found)}, "
                f"the router was made for {trained_for.base_id} with {short_fingerprint(wanted)}; give that base, "
                "or train a router for this one"
            )
    if experts is None:
        return []
    missing = [label for label in trained_for.experts if label not in experts]
    if missing:
        raise policy.missing_expert(
            f"the router can choose {', '.join(map(repr, missing))}, which {policy.place} does not have (it has "
            f"{', '.join(map(repr, sorted(experts))) or 'none'}); {policy.add_expert.format(name=missing[0])}, "
            "or train a router for these experts"
        )
    changed = [
        f"expert {label!r}: the router was trained for the artifact with manifest {artifact[:12]}, {policy.place} has "
        f"{given[:12]}; train the router again"
        for label, artifact in trained_for.experts.items()
        if artifact and (given := experts[label]) and given != artifact
    ]
    if changed and policy.another_artifact == "error":
        raise RouterError(changed[0])
    return changed
