"""What an expert can be called: one rule for the command line, requests and routers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meswitch_cli.errors import RouterError, UsageError
from meswitch_cli.names import check_name
from meswitch_cli.router.decide.labels import check_label
from meswitch_cli.router.store.manifest import parse_manifest
from meswitch_cli.router.train.data import read_examples


@pytest.mark.parametrize("name", ["maths", "7b", "acme/maths-v1.2_a", "a" * 128])
def test_what_serves_can_be_routed_to(name: str, tmp_path: Path) -> None:
    assert check_name(name) == check_label(name, "here") == name
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "x", "domain": name}))
    assert read_examples(file)[0].domain == name


@pytest.mark.parametrize(
    "name", ["", "base", "auto", "a" * 129, "../etc", "-x", ".x", "/x", "a b", "maté", "a|b", "a\n"]
)
def test_what_cannot_be_served_cannot_be_routed_to(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be an expert's name"):
        check_name(name)
    with pytest.raises(RouterError, match=r"line 3: .* cannot be an expert's name"):
        check_label(name, "line 3")


def test_a_router_is_stored_under_such_labels(tmp_path: Path) -> None:
    from router.conftest import COUNTS, examples, save

    from meswitch_cli.router import TrainingSettings, gather, train_router
    from meswitch_cli.router.train.data import Example

    names = {"maths": "acme/maths-v1.2", "code": "c" * 128}
    found = [Example(item.text, names.get(str(item.domain)), item.where) for item in examples(COUNTS)]
    artifact = save(train_router(gather(found), TrainingSettings(backend="tfidf")), tmp_path / "router")
    again = parse_manifest((artifact.path / "router.json").read_bytes(), "router.json")
    assert again.labels == tuple(sorted(names.values()))
