"""Figures, reports, labels by loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import RouterError
from meswitch_cli.router import Router
from meswitch_cli.router.train.autolabel import label_by_loss
from meswitch_cli.router.train.data import Example
from meswitch_cli.router.train.evaluation import evaluate
from meswitch_cli.router.train.losses import downstream, expert_losses, response_losses
from meswitch_cli.router.train.report import markdown, plots
from meswitch_cli.router.train.training import TrainedRouter
from zoo.tiny import make_pair

from .conftest import examples


def test_figures_agree_with_the_decisions(tfidf_router: Router) -> None:
    """The report's confusion matrix, recounted from what `route` says of each prompt."""
    given = examples({"maths": 30, "code": 30, None: 30}, seed=7)
    report = evaluate(tfidf_router, given, 0.95)
    counted = {"code": {}, "maths": {}, "null": {}}
    for item in given:
        decision = tfidf_router.route(item.text)
        column = decision.expert if decision.reason == "routed" else "fallback"
        row = counted[str(item.domain) if item.domain else "null"]
        row[column] = row.get(column, 0) + 1
    found = {
        row: {key: value for key, value in columns.items() if value} for row, columns in report["confusion"].items()
    }
    assert found == counted
    assert report["accuracy"]["prompts"] == 60 and report["null_prompts"] == 30
    assert report["out_of_domain"]["refused"]["value"] == counted["null"].get("fallback", 0) / 30
    last = report["risk_coverage"][-1]
    assert last["coverage"] == 1 and last["precision"] == pytest.approx(report["accuracy"]["value"])


def test_report_is_json_markdown_and_pictures(trained_probe: TrainedRouter) -> None:
    report = json.loads(json.dumps(trained_probe.report, allow_nan=False))
    text = markdown(report | {"downstream": {"items": 3, "loss": {"this router": 0.25}}})
    accuracy = 100 * report["test"]["accuracy"]["value"]
    assert f"| probe | {accuracy:.1f} [" in text and "| baseline: TF-IDF |" in text
    assert "| baseline: majority | 50.0 % |" in text and "| this router | 0.2500 |" in text
    pictures = plots(report)
    assert pictures["report.png"].startswith(b"\x89PNG") and b"<svg" in pictures["report.svg"][:1000]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("two"), dtype=torch.float32, relative_delta=0.3)


def test_losses_are_transformers_own(two: tuple[Path, Path]) -> None:
    items = [Example("ab", None, "", response="cdef"), Example("a longer prompt", None, "", response="x")]
    found = response_losses(two[0], items)
    tokenizer = AutoTokenizer.from_pretrained(two[0])
    model = AutoModelForCausalLM.from_pretrained(two[0], dtype=torch.float32)
    for row, item in enumerate(items):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": item.text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        ids = [*prompt, *tokenizer.encode(item.response)]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), labels=labels).loss
        assert float(found[row]) == pytest.approx(float(expected), rel=0.02)
    with pytest.raises(RouterError, match='line 1: needs a "response"'):
        expert_losses({"a": two[0]}, [Example("x", None, "line 1")], None)


def test_an_artifact_is_judged_as_the_expert_it_restores_to(
    two: tuple[Path, Path], make_artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = make_artifact(two, bits=4, embedding_bits=4)
    items = [Example(f"prompt {index}", None, "", response="an answer") for index in range(4)]
    with pytest.raises(RouterError, match="an artifact needs its base"):
        expert_losses({"a": artifact.path}, items, None)
    restored = restore(artifact, Checkpoint.open(str(two[0])), tmp_path / "restored")
    losses = expert_losses({"artifact": artifact.path, "restored": restored, "base": two[0]}, items, str(two[0]))
    assert torch.equal(losses["artifact"], losses["restored"])
    assert not torch.equal(losses["artifact"], losses["base"])


def test_labels_by_loss() -> None:
    items = [Example(f"prompt {index}", None, "", response="r") for index in range(3)]
    losses = {"maths": torch.tensor([1.0, 2.0, 1.50]), "code": torch.tensor([2.0, 1.0, 1.52])}
    labels = label_by_loss(items, losses, margin=0.05)
    assert [item.domain for item in labels.examples] == ["maths", "code", None]
    assert (labels.certain, labels.uncertain) == ({"code": 1, "maths": 1}, 1)
    soft = labels.examples[2].soft
    assert soft is not None and soft["maths"] == pytest.approx(1 / (1 + torch.e**-0.4))
    assert sum(soft.values()) == pytest.approx(1)


def test_downstream_by_hand() -> None:
    losses = {"maths": torch.tensor([1.0, 3.0, 2.0]), "code": torch.tensor([2.0, 1.0, 1.5])}
    found = downstream(losses, torch.tensor([4.0, 4.0, 4.0]), ["maths", "code", "maths"], ["maths", "base", "maths"])
    assert found["loss"] == pytest.approx(
        {
            "the lowest loss of all (oracle)": 3.5 / 3,
            "the domain's expert": 4 / 3,
            "this router": 7 / 3,
            "chance (mean of the experts)": 10.5 / 6,
            "always code (best single expert)": 1.5,
            "always the base": 4,
        }
    )
