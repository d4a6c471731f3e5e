"""Tasks on live tiny models, through the real harness."""

import json
from pathlib import Path

import pytest
import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import EvaluationError, UsageError
from meswitch_cli.evaluation.task_choice import choose_tasks
from meswitch_cli.evaluation.task_source import SHIPPED, load_tasks
from meswitch_cli.evaluation.tasks import live_model, paired_scores, run_tasks, score_row, wilson
from meswitch_cli.model.build import build_model
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.model.weights import CheckpointWeights

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "choice.yaml").write_text(CHOICE)
    lines = [{"prompt": f"{n} plus 1 is ", "choices": [str(n), str(n + 1)], "answer": 1} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


@pytest.fixture(scope="module")
def model(pair: tuple[Path, Path]) -> object:
    weights = CheckpointWeights(Checkpoint.open(str(pair[1])))
    return live_model(build_model(weights, torch.device("cpu"), torch.float32), load_tokenizer(pair[1]), 512)


def test_choice_scores_are_those_of_the_model_itself(model: object, folder: Path, pair: tuple[Path, Path]) -> None:
    run = run_tasks(model, ["tiny_choice"], folder, limit=None, seed=0, chat=False)[0]
    weights = CheckpointWeights(Checkpoint.open(str(pair[1])))
    ours, tokenizer = build_model(weights, torch.device("cpu"), torch.float32), load_tokenizer(pair[1])

    def likelihood(prompt: str, choice: str) -> float:
        before, after = tokenizer(prompt).input_ids, tokenizer(choice).input_ids
        with torch.no_grad():
            logs = torch.log_softmax(ours(torch.tensor([before + after])).logits[0], -1)
        return float(sum(logs[len(before) - 1 + index, token] for index, token in enumerate(after)))

    assert run.metric == "acc" and len(run.documents) == 6
    for document, line in zip(run.documents, (folder / "data.jsonl").read_text().splitlines(), strict=True):
        item = json.loads(line)
        best = max(item["choices"], key=lambda choice: likelihood(item["prompt"], choice))
        assert document.answer == best
        assert document.scores["acc"] == float(best == item["choices"][1]) and document.target == item["choices"][1]


def test_generation_is_the_model_s_greedy_answer_and_pairs(model: object) -> None:
    first, again = (run_tasks(model, ["meswitch_maths"], None, limit=2, seed=0, chat=True)[0] for _ in range(2))
    assert first == again and first.metric == "exact_match"
    assert first.documents[0].prompt.startswith("<|user|>Dax went") and first.documents[0].target == "282"
    left, right = paired_scores(first, again)
    assert [item.digest for item in left] == [item.digest for item in right]
    row = score_row(first, "exact_match")
    assert row["documents"] == 2 and row["score_low"] <= row["score"] <= row["score_high"]
    other = run_tasks(model, ["meswitch_maths"], None, limit=1, seed=0, chat=True)[0]
    assert score_row(again, "exact_match") == row
    with pytest.raises(EvaluationError, match="did not see the same documents"):
        paired_scores(first, other)
    assert score_row(other, "exact_match")["documents_sha256"] != row["documents_sha256"]


@pytest.mark.parametrize("name", ["meswitch_maths", "meswitch_logic", "meswitch_code"])
def test_shipped_tasks_take_the_answer_after_the_mark(name: str) -> None:
    from lm_eval.api.instance import Instance

    task = load_tasks([name], None)[0]
    document = next(iter(task.test_docs()))
    target = task.doc_to_target(document)
    for text, right in (
        (f"some steps\n#### {target}", 1.0),
        (f"{target}\n", 1.0),
        (f"first #### 77777\nthen\n####  {target} \n", 1.0),
        ("some steps\n#### nothing like it", 0.0),
    ):
        instance = Instance("generate_until", document, ("prompt", {}), 0)
        instance.resps.append(text)
        task._instances = [instance]
        task.apply_filters()
        found = task.process_results(document, [instance.filtered_resps["answer"]])
        assert found["exact_match"] == right, text


def test_shipped_data_is_what_its_maker_writes() -> None:
    for path in SHIPPED.glob("*_choice.jsonl"):
        for line in path.read_text().splitlines():
            item = json.loads(line)
            assert len(set(item["choices"])) == len(item["choices"]) > 1 and 0 <= item["answer"] < len(item["choices"])
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {path.stem for path in SHIPPED.glob("*.jsonl")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "data.jsonl").unlink(), "data.jsonl: cannot be read"),
        (lambda folder: (folder / "data.jsonl").write_text(""), "data.jsonl: no line with data"),
        (lambda folder: (folder / "data.jsonl").write_text('{"prompt": "x"\n'), "line 1: not JSON"),
        (lambda folder: (folder / "data.jsonl").write_text("[1]\n"), "line 1: not a JSON object"),
        (lambda folder: (folder / "choice.yaml").write_text("task: [unclosed"), "not a task file"),
        (lambda folder: (folder / "choice.yaml").write_text(""), "not a task file"),
        (
            lambda folder: (folder / "choice.yaml").write_text(CHOICE + "doc_to_text: !function evil.run\n"),
            "--allow-task-code",
        ),
        (lambda folder: (folder / "choice.yaml").write_text("include: other.yaml\n"), "no such task file"),
    ],
)
def test_bad_task_files_are_named(folder: Path, change: object, message: str) -> None:
    change(folder)  # type: ignore[operator]
    with pytest.raises(EvaluationError, match=message):
        load_tasks([str(folder / "choice.yaml")], None)


def test_templates_cannot_reach_the_interpreter(folder: Path) -> None:
    text = CHOICE.replace('"{{prompt}}"', "\"{{ ''.__class__.__mro__[1].__subclasses__() }}\"")
    (folder / "choice.yaml").write_text(text)
    with pytest.raises(EvaluationError, match="unsafe"):
        load_tasks([str(folder / "choice.yaml")], None)


def test_code_beside_a_task_runs_only_when_allowed(folder: Path) -> None:
    (folder / "own.py").write_text("def text(doc):\n    return 'own ' + doc['prompt']\n")
    (folder / "choice.yaml").write_text(CHOICE.replace('doc_to_text: "{{prompt}}"', "doc_to_text: !function own.text"))
    with pytest.raises(EvaluationError, match="runs code"):
        load_tasks(["tiny_choice"], folder)
    task = load_tasks(["tiny_choice"], folder, allow_code=True)[0]
    assert task.doc_to_text({"prompt": "x"}) == "own x"


def test_a_file_that_is_no_task_does_not_hide_the_others(folder: Path) -> None:
    (folder / "aaa.yaml").write_text("")
    assert [task.task_name for task in load_tasks(["tiny_choice", "meswitch_maths"], folder)] == [
        "tiny_choice",
        "meswitch_maths",
    ]
    with pytest.raises(EvaluationError, match=r"no such task.*aaa\.yaml: not a task file"):
        load_tasks(["tiny_chioce"], folder)


def test_choices_stand_for_tasks_and_failures_are_told_apart(folder: Path) -> None:
    options = [f"maths={folder / 'choice.yaml'}, {folder / 'none.yaml'}", "meswitch_logic"]
    choices, failures = choose_tasks(options, {"maths"}, None, allow_code=False)
    assert [(item.owner, item.tasks) for item in choices] == [
        ("maths", ("tiny_choice",)),
        (None, ("meswitch_logic",)),
    ]
    assert list(failures) == [str(folder / "none.yaml")] and "no such task file" in failures[str(folder / "none.yaml")]
    with pytest.raises(UsageError, match="no expert is called 'code'"):
        choose_tasks(["code=meswitch_code"], {"maths"}, None, allow_code=False)
    with pytest.raises(UsageError, match="names no task"):
        choose_tasks([" , "], {"maths"}, None, allow_code=False)
    with pytest.raises(EvaluationError, match="'tiny_choice' is named twice"):
        choose_tasks(["tiny_choice", str(folder / "choice.yaml")], {"maths"}, folder, allow_code=False)


@pytest.mark.parametrize("task", ["tiny_choice", "meswitch_maths"])
def test_logits_that_are_not_finite_are_no_wrong_answers(folder: Path, pair: tuple[Path, Path], task: str) -> None:
    damaged = build_model(CheckpointWeights(Checkpoint.open(str(pair[1]))), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        damaged.model.norm.weight[3] = float("nan")
    with pytest.raises(EvaluationError, match=f"{task}: the model's logits are not finite"):
        run_tasks(live_model(damaged, load_tokenizer(pair[1]), 512), [task], folder, limit=2, seed=0, chat=False)


def test_unknown_names_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="shipped are meswitch_code"):
        load_tasks(["no_such_task"], None)
    with pytest.raises(EvaluationError, match="no such folder"):
        load_tasks(["no_such_task"], tmp_path / "none")
    with pytest.raises(EvaluationError, match="named twice"):
        load_tasks(["meswitch_maths", "meswitch_maths"], None)


def test_a_task_that_needs_the_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match="Hugging Face Hub, which cannot be reached"):
        load_tasks(["arc_easy"], None)


def test_wilson_is_statsmodels() -> None:
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    for right, count in ((0, 5), (3, 10), (99, 100)):
        found = wilson(np.array([1.0] * right + [0.0] * (count - right)))
        assert (found.low, found.high) == pytest.approx(proportion_confint(right, count, method="wilson"), abs=1e-9)
