"""`meswitch eval` as a user meets it: exit status and streams, on real files."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import ENVIRONMENT, Result, in_process, meswitch
from command_line import fails as refused
from patience import PATIENCE, until

from meswitch_cli.commands.eval_tables import judgements
from meswitch_cli.evaluation.routing import CHOICES
from zoo.tiny import Pair, make_pair

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """The command's own entry, in this process: importing the libraries anew for every case takes seconds."""
    return in_process


@pytest.fixture(scope="module")
def art(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "art"
    made = meswitch("compress", "--base", pair[0], "--expert", pair[1], "--out", out, "--salient", 4)
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sums.jsonl"
    lines = [{"prompt": f"what is {n} plus two", "response": f"it is {n + 2}, of course"} for n in range(12)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def inputs(pair: Pair, art: Path, out: Path) -> tuple[object, ...]:
    return ("--base", pair[0], "--expert", pair[1], "--artifact", art, "--out", out)


def test_the_whole_report(pair: Pair, art: Path, text: Path, tmp_path: Path) -> None:
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    done = meswitch(
        "eval", *inputs(pair, art, tmp_path / "out"), "--baseline", "bitdelta", "--text", f"expert={text}",
        "--text", neutral, "--tasks", "expert=meswitch_logic_choice", "--limit", 8, "--max-kld", 1, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"] and not report["errors"] and report["schema_version"] == 1
    rows = {(row["model"], row["set"]): row for row in report["fidelity"]}
    assert set(rows) == {(model, name) for model in ("art", "bitdelta") for name in ("sums", "neutral")}
    ours = rows["art", "sums"]
    wanted = "expert set tokens kl_mean kl_mean_se kl_p99 kl_max top1_agreement ln_ppl_ratio gap_recovered base_kl_mean"
    assert set(wanted.split()) <= ours.keys()
    assert ours["expert"] == "expert" and 0 < ours["kl_mean"] < ours["base_kl_mean"] and ours["kl_mean_se"] > 0
    assert ours["kl_mean"] <= ours["kl_p99"] <= ours["kl_p999"] <= ours["kl_max"]
    assert ours["kl_mean"] < rows["bitdelta", "sums"]["kl_mean"]
    assert ours["nbytes"] == sum(item["nbytes"] for item in json.loads((art / "meswitch.json").read_text())["shards"])
    assert report["models"][0]["manifest_sha256"] and report["experts"][0]["fingerprint"].startswith("sha256:")
    assert report["gates"] and all(gate["passed"] for gate in report["gates"])
    assert {row["model"] for row in report["tasks"]} == {"base", "expert", "art", "bitdelta"}
    verdicts = {row["verdict"] for row in report["comparisons"]}
    assert verdicts <= {"n too small", "worse", "better"}  # eight documents prove no equality
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    sums = [item for item in items if item["set"] == "sums" and item["model"] == "art"]
    assert sum(item["kl"] for item in sums) / sum(item["tokens"] for item in sums) == pytest.approx(ours["kl_mean"])
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 4 * 8
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 5 and "gap recovered" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page) and "<script" not in page
    assert "| art |" in (tmp_path / "out" / "report.md").read_text()
    assert report["options"]["limit"] == 8 and report["options"]["tasks"] == ["expert=meswitch_logic_choice"]
    assert undocumented(report) == set()


def undocumented(report: dict[str, Any]) -> set[str]:
    """Members of a report that docs/evaluation.md does not name."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    words = set(re.findall(r"`(\w+)(?:\[\])?`", page))
    found = {name for name in report if name not in words}
    for part, value in report.items():
        rows = value if isinstance(value, list) else [value] if part in ("base", "options") else []
        for row in rows:
            names = {re.sub("_(se|low|high)$", "", name) for name in row} if isinstance(row, dict) else set()
            found |= {f"{part}: {name}" for name in names if name.removeprefix("base_") not in words | {""}}
    return found


def test_two_runs_give_the_same_figures_and_streaming_too(
    run: Run, pair: Pair, art: Path, text: Path, tmp_path: Path
) -> None:
    reports = []
    streamed = ("--mode", "stream", "--tasks", "meswitch_logic_choice")
    for out, options in (("a", ()), ("b", ()), ("c", streamed)):
        done = run("eval", *inputs(pair, art, tmp_path / out), "--text", text, "--limit", 4, "--json", *options)
        assert done.returncode == (options == streamed), done.stderr
        reports.append(json.loads(done.stdout))
    assert [item["where"] for item in reports[2]["errors"]] == ["tasks"]
    assert "these models are streamed" in reports[2]["errors"][0]["message"] and not reports[2]["tasks"]
    assert reports[0]["fidelity"] == reports[1]["fidelity"]
    assert reports[2]["environment"]["mode"] == "stream"
    assert reports[2]["fidelity"][0]["kl_mean"] == pytest.approx(reports[0]["fidelity"][0]["kl_mean"], rel=1e-3)


def test_limits_fail_the_command_and_name_what_missed(
    run: Run, pair: Pair, art: Path, text: Path, tmp_path: Path
) -> None:
    done = run(
        "eval", *inputs(pair, art, tmp_path / "out"), "--text", text, "--limit", 4, "--max-kld", 1e-6,
        "--min-recovery", 1.5,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--max-kld 1e-06: art on sums" in done.stderr and "--min-recovery 1.5: art on sums" in done.stderr
    assert "Traceback" not in done.stderr and "| max-kld | art |" in done.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["complete"]


def test_bad_input_is_named_before_any_work(run: Run, pair: Pair, art: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "other").mkdir()
    other_base, _ = make_pair(tmp_path / "other", seed=3)
    (tmp_path / "third").mkdir()
    _, other_expert = make_pair(tmp_path / "third", relative_delta=0.02)
    empty, broken, silent = (tmp_path / name for name in ("empty.jsonl", "broken.jsonl", "silent.jsonl"))
    empty.write_text("")
    broken.write_text('{"prompt": "x", "response": "y"}\nnonsense\n')
    silent.write_text('{"prompt": "x"}\n')
    given = inputs(pair, art, out)
    refused(run("eval", *given), 2, "--text or --tasks")
    refused(
        run("eval", "--base", pair[0], "--expert", pair[1], "--out", out, "--text", text), 2, "--artifact or --baseline"
    )
    refused(run("eval", *given, "--text", empty), 1, "no line with data")
    refused(run("eval", *given, "--text", broken), 1, "line 2")
    refused(run("eval", *given, "--text", silent), 1, "example 1 has no answer")
    refused(run("eval", *given, "--text", tmp_path / "none.jsonl"), 1, "cannot be read")
    refused(run("eval", *given, "--text", f"nobody={text}"), 2, "no expert is called 'nobody'")
    refused(run("eval", *given, "--text", text, "--baseline", "gptq"), 2, "no method 'gptq'")
    called_base = ("--base", pair[0], "--expert", f"base={pair[1]}", *given[4:], "--text", text)
    refused(run("eval", *called_base), 1, "two models are called 'base'")
    labelled = ("--text", f"{pair[1].name}={text}")
    refused(run("eval", *given, *labelled, "--router", tmp_path), 1, "not a router")
    refused(run("eval", *given, "--text", text, "--router", tmp_path), 2, "no mixed set")
    refused(run("eval", *given, "--text", text, "--tasks", "nobody=meswitch_maths"), 2, "no expert is called 'nobody'")
    refused(run("eval", *given, "--tasks", ","), 2, "names no task")
    refused(run("eval", *given, "--tasks", tmp_path / "none.yaml"), 1, "no such task file")
    refused(run("eval", *given, "--text", text, "--server", "http://127.0.0.1:9"), 2, "give some")
    refused(run("eval", *given, "--tasks", "meswitch_maths", "--server", "localhost:9"), 2, "must be a URL")
    refused(run("eval", *given, "--text", text, "--max-kld", "nan"), 2, "--max-kld nan")
    refused(run("eval", *given, "--text", text, "--calibration", tmp_path / "none.jsonl"), 1, "none.jsonl: cannot be")
    refused(run("eval", *given, "--text", text, "--baseline", "meswitch:activations=file"), 2, "--calibration")
    wrong_base = ("--base", other_base, *given[2:], "--text", text)
    refused(run("eval", *wrong_base), 1, "wrong base")
    wrong_expert = ("--base", pair[0], "--expert", other_expert, *given[4:], "--text", text)
    refused(run("eval", *wrong_expert), 1, "made from another expert")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").write_text("mine")
    refused(run("eval", *inputs(pair, art, tmp_path / "busy"), "--text", text, "--force"), 1, "in use")
    assert not out.exists()


def test_tokenizer_mismatch_is_named(run: Run, pair: Pair, art: Path, text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pair[0], base)
    value = json.loads((base / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(value))
    refused(
        run("eval", "--base", base, *inputs(pair, art, tmp_path / "o")[2:], "--text", text), 1, "tokenizer mismatch"
    )


def test_what_fails_is_named_and_the_rest_is_kept(run: Run, pair: Pair, art: Path, text: Path, tmp_path: Path) -> None:
    """A task without data and one that needs the network: fidelity and the good task stay in the report."""
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n"
    )
    done = run(
        "eval", *inputs(pair, art, tmp_path / "out"), "--text", text, "--limit", 2, "--include-path", tmp_path,
        "--tasks", "gone,meswitch_logic_choice",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "gone.jsonl: cannot be read" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"] and len(report["fidelity"]) == 1
    assert {row["task"] for row in report["tasks"]} == {"meswitch_logic_choice"}
    assert [row["where"] for row in report["errors"]] == ["tasks: gone"]  # once, not once for every model
    assert done.stderr.index("gone.jsonl: cannot be read") < done.stderr.index("reference")  # before any model runs


def test_an_interrupted_evaluation_keeps_its_report_and_may_be_replaced(
    run: Run, pair: Pair, art: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("eval", *inputs(pair, art, tmp_path / "out"), "--text", text, "--limit", 2)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("meswitch_cli.evaluation.job.compare_models", stop)
        done = run(*call)
    assert done.returncode == 130 and "stopped; what was measured is in" in done.stderr
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["complete"]
    refused(run(*call), 1, "--force to replace an evaluation")
    assert run(*call, "--force").returncode == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["complete"]


def test_logits_that_are_not_finite_are_named(run: Run, pair: Pair, text: Path, tmp_path: Path) -> None:
    """Weights that are finite but overflow on the way: the base is at fault, and said to be."""
    base, expert = tmp_path / "base", tmp_path / "expert"
    for source, target in zip(pair, (base, expert), strict=True):
        shutil.copytree(source, target)
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    safetensors.torch.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    done = run(
        "eval", "--base", base, "--expert", expert, "--baseline", "bitdelta", "--out", tmp_path / "out",
        "--text", text, "--limit", 2, "--tasks", "meswitch_maths_choice",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(base) in done.stderr and "not finite" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["model"] for row in report["fidelity"]] == ["bitdelta"]  # measured all the same
    assert [item["where"] for item in report["errors"]] == ["expert on sums: base", "tasks: base"]
    assert "not finite" in report["errors"][1]["message"]
    assert {row["model"] for row in report["tasks"]} == {"expert", "bitdelta"}


def test_a_router_s_choices_are_measured(run: Run, pair: Pair, art: Path, tmp_path: Path) -> None:
    from meswitch_cli.router.store.artifact import write_router
    from meswitch_cli.router.train.data import Example, gather
    from meswitch_cli.router.train.settings import TrainingSettings
    from meswitch_cli.router.train.training import train_router

    _, second = make_pair(tmp_path / "second", relative_delta=0.03)
    made = run("compress", "--base", pair[0], "--expert", second, "--out", tmp_path / "art2", "--salient", 4)
    assert made.returncode == 0, made.stderr
    prompts = {
        "sums": [f"what is {n} plus {n * 7} and then add {n + 3}" for n in range(60)],
        "verse": [f"write a gentle poem about the moon over river number {n}" for n in range(60)],
    }
    examples = [
        Example(text, label, f"{label}:{n}") for label, texts in prompts.items() for n, text in enumerate(texts)
    ]
    trained = train_router(gather(examples, min_prompts=10), TrainingSettings(backend="tfidf"))
    write_router(tmp_path / "router", trained.manifest, trained.router.model, trained.router.backend, trained.store)
    for label, texts in prompts.items():
        lines = [json.dumps({"prompt": text, "response": "all right"}) for text in texts[:6]]
        (tmp_path / f"{label}_held_out.jsonl").write_text("\n".join(lines))
    task = tmp_path / "tasks"
    task.mkdir()
    (task / "sums.yaml").write_text(
        "task: sums_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{prompt}}"\ndoc_to_target: 0\ndoc_to_choice: [right, wrong]\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (task / "sums.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in prompts["sums"][:5]))
    done = run(
        "eval", "--base", pair[0], "--expert", f"sums={pair[1]}", "--expert", f"verse={second}", "--artifact", art,
        "--artifact", tmp_path / "art2", "--router", tmp_path / "router", "--out", tmp_path / "out", "--json",
        "--text", f"sums={tmp_path / 'sums_held_out.jsonl'}", "--text", f"verse={tmp_path / 'verse_held_out.jsonl'}",
        "--tasks", f"sums={task / 'sums.yaml'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    router = report["router"]
    assert router["labels"] == ["sums", "verse"] and set(router["loss"]) == {*CHOICES}
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    own = [item for item in items if item["model"] in ("art", "art2")]
    oracle = sum(item["loss"] for item in own) / sum(item["tokens"] for item in own)
    assert router["loss"]["oracle"]["value"] == pytest.approx(oracle, rel=1e-4)
    base = [item for item in items if item["model"] == "base"]
    expected = sum(item["loss"] for item in base) / sum(item["tokens"] for item in base)
    assert router["loss"]["base"]["value"] == pytest.approx(expected, rel=1e-4)
    full = sum(item["expert_loss"] for item in own) / sum(item["tokens"] for item in own)
    assert router["loss"]["full experts"]["value"] == pytest.approx(full, rel=1e-4)
    scores = {row["model"]: row["score"] for row in report["tasks"]}
    assert {choice: value["value"] for choice, value in router["tasks"]["sums_task"].items()} == {
        "base": scores["base"],
        "random": (scores["art"] + scores["art2"]) / 2,
        "routed": pytest.approx(scores["art"], abs=0.4),
        "oracle": scores["art"],
        "full experts": scores["sums"],
    }
    assert "| full experts |" in (tmp_path / "out" / "report.md").read_text()
    assert router["accuracy"]["value"] >= 0.8 and set(router["tasks"]) == {"sums_task"}
    if router["accuracy"]["value"] == 1:
        assert router["loss"]["routed"] == router["loss"]["oracle"]
    missing = run(
        "eval", *inputs(pair, art, tmp_path / "out2"), "--router", tmp_path / "router",
        "--text", f"expert={tmp_path / 'sums_held_out.jsonl'}",
    )  # fmt: skip
    refused(missing, 2, "give --expert sums=FOLDER")


def wait_for(log: Path, pattern: str) -> str:
    """The first match in a file that another process writes."""
    until(lambda: re.search(pattern, log.read_text()), log.read_text)
    return next(re.finditer(pattern, log.read_text()))[0]


def test_a_running_server_is_evaluated_too(run: Run, pair: Pair, art: Path, tmp_path: Path) -> None:
    """The real server with the artifact: in fp32 its greedy answers are those of the same weights in this process."""
    words = ("serve", "--base", pair[0], "--expert", f"expert={art}", "--port", 0, "--dtype", "float32")
    (tmp_path / "sums.yaml").write_text(
        "task: sums_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n"
        'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{prompt}}"\n'
        'generation_kwargs: {until: ["</s>"], max_gen_toks: 12, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    prompts = [json.dumps({"prompt": f"what is {n} plus two"}) for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(prompts))
    log = tmp_path / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "meswitch_cli", *map(str, words)], stdout=stream, stderr=stream, env=ENVIRONMENT
        )
    try:
        address = wait_for(log, r"http://127\.0\.0\.1:\d+")
        done = run(
            "eval", *inputs(pair, art, tmp_path / "out"), "--server", address, "--limit", 4, "--json",
            "--include-path", tmp_path, "--tasks", "sums_task,meswitch_maths_choice",
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait(PATIENCE)
    report = json.loads(done.stdout)
    served = f"expert at {address}"
    assert done.returncode == 1 and [item["where"] for item in report["errors"]] == [
        f"tasks: {served}: meswitch_maths_choice"  # a chat endpoint gives no probabilities of a prompt
    ]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    answers = {
        model: [item["answer"] for item in samples if item["model"] == model and item["task"] == "sums_task"]
        for model in ("art", served)
    }
    assert len(answers[served]) == 4 and answers[served] == answers["art"]
    assert any(row["model"] == served and row["against"] == "expert" for row in report["comparisons"])


def test_a_terminal_gets_tables_and_a_judgement(
    pair: Pair, art: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    given = (*inputs(pair, art, tmp_path / "out"), "--text", f"expert={text}", "--max-kld", 1)
    shown = in_process("eval", *given, terminal=True)
    assert shown.returncode == 0, shown.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["fidelity"]
    assert "| ---" not in shown.stdout and "fidelity to expert on sums" in shown.stdout
    assert re.search(rf"art +│ +[\d.]+ │ +{re.escape(format(row['kl_mean'], '.3g'))} │", shown.stdout)
    assert re.search(r"base +│ +0 │ +[\d.e-]+ │ +100 │", shown.stdout) and "Limits" in shown.stdout
    words = judgements(report)
    assert " ".join(shown.stdout.split()).endswith(words[0]) and "12 items are few" in words[0]
    assert f"every figure, with pictures: {tmp_path / 'out' / 'report.html'}" in shown.stderr
    again = in_process("eval", *given, "--force", "--markdown", terminal=True)
    assert "| --- |" in again.stdout and " ".join(again.stdout.split()).endswith(words[0])


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0003, "hardly to be told from"),
        (0.004, "close to the full expert"),
        (0.05, "not as near as compress usually comes"),
        (0.3, "far from the full expert"),
        (1.4, "no nearer to the full expert than the base is: do not serve it"),
    ],
)
def test_a_judgement_is_of_the_worst_set(share: float, words: str) -> None:
    row = {"model": "m", "set": "own", "kl_share": share, "kl_mean": 0.01, "top1_agreement": 0.98, "items": 40}
    other = row | {"set": "other", "kl_share": share / 2}
    report = {
        "models": [{"label": "m", "kind": "artifact"}, {"label": "rtn", "kind": "baseline"}],
        "fidelity": [other, row, row | {"model": "rtn"}, row | {"kl_share": None}],
    }
    (told,) = judgements(report)
    assert told.startswith("m is ") and words in told and "On own, the worst of 2 sets" in told
    assert f"{100 * share:.2g} % of the base's" in told and "items are few" not in told
    assert judgements(report | {"fidelity": []}) == []
