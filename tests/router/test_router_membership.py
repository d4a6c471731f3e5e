"""Does a router belong to a base and to experts? One answer and one text, for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from meswitch_cli.errors import RouterError, UsageError
from meswitch_cli.evaluation.routing import POLICY as EVALUATED
from meswitch_cli.router import Router, open_router
from meswitch_cli.router.backends.base import FolderBase, ServedBase
from meswitch_cli.router.store import TrainedFor, check_membership
from meswitch_cli.router.train.training import TrainedRouter
from meswitch_cli.server.routing import POLICY as SERVED
from zoo.tiny import make_pair

FINGERPRINT = "sha256:" + "1" * 64
TRAINED_FOR = TrainedFor({"maths": "a" * 64, "code": None}, "owner/base", FINGERPRINT)
POLICIES = pytest.mark.parametrize("policy", [SERVED, EVALUATED], ids=["served", "evaluated"])


class Base(ServedBase):
    def __init__(self, name: str, fingerprint: str | None) -> None:
        super().__init__(None, None, name=name, fingerprint=fingerprint)  # type: ignore[arg-type]


OWN = Base("./base", FINGERPRINT)


@POLICIES
def test_every_expert_must_be_there(policy: object) -> None:
    assert check_membership(TRAINED_FOR, OWN, {"maths": "a" * 64, "code": "b" * 64, "law": None}, policy) == []
    with pytest.raises(policy.missing_expert, match=f"can choose 'code', which {policy.place} does not have") as caught:
        check_membership(TRAINED_FOR, OWN, {"maths": "a" * 64}, policy)
    assert "it has 'maths'" in str(caught.value) and policy.add_expert.format(name="code") in str(caught.value)
    with pytest.raises(policy.missing_expert, match=r"'maths', 'code'.*it has none"):
        check_membership(TRAINED_FOR, OWN, {}, policy)
    assert check_membership(TRAINED_FOR, OWN) == []  # who has no experts compares none


def test_what_an_exit_status_says() -> None:
    """`eval` was called wrongly where an artifact is missing (2); a server cannot serve (1)."""
    assert EVALUATED.missing_expert is UsageError and UsageError.exit_code == 2
    assert SERVED.missing_expert is RouterError and RouterError.exit_code == 1


def test_another_artifact_is_an_error_or_a_warning() -> None:
    experts = {"maths": "c" * 64, "code": "d" * 64}
    said = "'maths': the router was trained for the artifact with manifest aaaaaaaaaaaa, this {} has cccccccccccc"
    with pytest.raises(RouterError, match=said.format("evaluation")):
        check_membership(TRAINED_FOR, OWN, experts, EVALUATED)
    (warning,) = check_membership(TRAINED_FOR, OWN, experts, SERVED)
    assert said.format("server") in warning and "train the router again" in warning
    # A hash that either side does not know is not compared.
    assert check_membership(TRAINED_FOR, OWN, {"maths": None, "code": None}, EVALUATED) == []


@POLICIES
def test_the_base_must_be_the_same(policy: object) -> None:
    experts = {"maths": "a" * 64, "code": None}
    other = Base("./other", "sha256:" + "2" * 64)
    with pytest.raises(RouterError, match=r"made for another base: \./other has fingerprint sha256:2") as caught:
        check_membership(TRAINED_FOR, other, experts, policy)
    assert f"owner/base with {FINGERPRINT[:19]};" in str(caught.value)  # of a hash, 12 digits
    with pytest.raises(RouterError, match=r"reads the hidden states of its base.*owner/base.*--base"):
        check_membership(TRAINED_FOR, None, experts, policy)
    assert check_membership(TRAINED_FOR, Base("./unknown", None), experts, policy) == []
    # A router that reads no base goes with any.
    assert check_membership(TrainedFor(TRAINED_FOR.experts), other, experts, policy) == []


def test_a_folder_is_compared_before_anything_of_the_base_is_loaded(
    trained_probe: TrainedRouter, probe_folder: Path, base: Path, tmp_path: Path, load_probe: Callable[[Path], Router]
) -> None:
    manifest = trained_probe.manifest
    assert manifest.trained_for == TrainedFor(manifest.experts, manifest.base_id, manifest.base_fingerprint)
    assert FolderBase(str(base)).fingerprint == manifest.base_fingerprint
    mine, theirs = open_router(probe_folder, str(base)), load_probe(probe_folder)
    assert mine.route("two plus two").probabilities == pytest.approx(theirs.route("two plus two").probabilities)
    another = make_pair(tmp_path / "other", seed=9, num_hidden_layers=4)[0]
    with pytest.raises(RouterError, match="made for another base"):
        open_router(probe_folder, str(another))
