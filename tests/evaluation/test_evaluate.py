"""The evaluation as a library: what docs/evaluation.md shows, and what the package names."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import meswitch_cli.evaluation
from meswitch_cli.artifact.artifact import Artifact
from zoo.tiny import Pair


def test_the_python_of_the_page(
    pair: Pair,
    make_artifact: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    for name, folder in zip(("base", "maths"), pair, strict=True):
        (tmp_path / name).symlink_to(folder)
    make_artifact(pair, out="maths-1bit")
    lines = [{"prompt": f"what is {n} plus two", "response": f"it is {n + 2}"} for n in range(3)]
    (tmp_path / "held-out.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/evaluation.md", "exec"), {})
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["complete"] and float(capsys.readouterr().out) == report["fidelity"][0]["kl_mean"] > 0


def test_the_package_names_what_it_has_and_nothing_else() -> None:
    for name in meswitch_cli.evaluation.__all__:
        assert getattr(meswitch_cli.evaluation, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        meswitch_cli.evaluation.nothing  # noqa: B018
