"""Router commands as a user meets them: a real process, real files, exit status, streams."""

import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import fails, in_process, meswitch

import zoo
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.disk import file_digest
from zoo.tiny import make_pair

WORDS = {
    "maths": ["sum", "product", "fraction", "triangle", "integer", "divide", "equation", "percent", "rest", "total"],
    "code": ["function", "python", "loop", "variable", "compile", "string", "return", "array", "import", "class"],
    "law": ["court", "contract", "tenant", "liability", "statute", "plaintiff", "appeal", "damages", "clause", "jury"],
}


def lines(domain: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(f"{domain}/{seed}")
    return [
        {"prompt": f"{' '.join(draw.choices(WORDS[domain], k=8))} {index}", "domain": domain, "response": domain}
        for index in range(count)
    ]


def write(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, items)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("base"), num_hidden_layers=4)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "data.jsonl", [*lines("maths", 60), *lines("code", 60)])


@pytest.fixture(scope="module")
def router(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "router"
    made = meswitch("train-router", "--base", base, "--data", data, "--out", out, "--plot", "--max-tokens", 48)
    assert made.returncode == 0, made.stderr
    assert "accuracy" in made.stdout and "baseline tfidf" in made.stdout and "fallback" in made.stdout
    assert "were cut; --max-tokens reads more of them" in made.stderr
    assert "Loading weights" not in made.stderr  # a bar of transformers'
    names = {path.name for path in out.iterdir()}
    assert {"router.json", "report.json", "report.md", "report.png", "report.svg"} <= names
    return out


def test_train_route_add_eval_remove(router: Path, base: Path, data: Path, tmp_path: Path) -> None:
    asked = in_process("route", "--router", router, "--base", base, "--json", lines("maths", 1, seed=1)[0]["prompt"])
    decision = json.loads(asked.stdout)
    assert list(decision) == ["expert", "confidence", "probabilities", "reason", "latency_ms"]
    assert decision["expert"] in ("maths", "base") and decision["probabilities"]["maths"] > 0.5
    assert decision["probabilities"]["maths"] + decision["probabilities"]["code"] == pytest.approx(1)
    shown = meswitch("route", "--router", router, "--base", base, "-", stdin="word " * 25_000)
    assert shown.returncode == 0 and "confidence" in shown.stdout
    assert "a prompt of 124999 characters is routed by 48 tokens of it" in shown.stderr

    bigger = tmp_path / "bigger"
    law = write(tmp_path / "law.jsonl", lines("law", 60))
    added = in_process(
        "router", "add", "--router", router, "--base", base, "--expert", "law", "--data", law, "--out", bigger,
        "--max-regression", 0.2,
    )  # fmt: skip
    assert added.returncode == 0, added.stderr
    assert "before" in added.stdout and "refitted in" in added.stdout

    held_out = write(tmp_path / "held-out.jsonl", [*lines("law", 20, seed=2), *lines("code", 20, seed=2)])
    measured = in_process(
        "router", "eval", "--router", bigger, "--base", base, "--data", held_out, "--out", tmp_path / "report", "--json"
    )
    report = json.loads(measured.stdout)
    assert report["test"]["accuracy"]["value"] > 0.8
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert (tmp_path / "report" / "report.svg").exists()
    fails(
        in_process("router", "eval", "--router", router, "--base", base, "--data", held_out),
        1, "unknown domain 'law'; this router knows code, maths",
    )  # fmt: skip

    removed = in_process("router", "remove", "--router", bigger, "--expert", "law", "--json", "--max-regression", 0.2)
    assert set(json.loads(removed.stdout)["after"]) == {"code", "maths"}
    assert json.loads((bigger / "router.json").read_text())["labels"] == ["code", "maths"]


def test_cards_explanations_and_feedback(tmp_path: Path) -> None:
    """A router of experts that nobody gave prompts of, asked why, and corrected."""
    out = tmp_path / "router"
    for name in ("maths", "law"):
        (tmp_path / name).mkdir()
    made = in_process(
        "train-router", "--backend", "tfidf", "--auto", "--artifact", f"maths={tmp_path / 'maths'}",
        "--artifact", f"law={tmp_path / 'law'}", "--target-precision", 0.5, "--out", out,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "prompts of its card and of its field" in made.stderr
    asked = "Can my landlord keep my deposit?"
    told = json.loads(in_process("route", "--router", out, "--gate", "off", "--explain", "--json", asked).stdout)
    assert told["expert"] == "law"
    assert asked in told["explanation"]["prompts"]
    assert told["explanation"]["distance"] <= told["explanation"]["distance_threshold"]
    shown = in_process("route", "--router", out, "--explain", asked)
    assert "nearest known prompts" in shown.stdout and "landlord" in shown.stdout
    said = write(tmp_path / "said.jsonl", [{"prompt": asked, "domain": "maths"}])
    learned = in_process("router", "add", "--router", out, "--feedback", said, "--max-regression", 1)
    assert learned.returncode == 0, learned.stderr
    again = json.loads(in_process("route", "--router", out, "--gate", "off", "--explain", "--json", asked).stdout)
    assert again["explanation"]["nearest"][0]["owner"] == "maths"
    fails(in_process("router", "add", "--router", out), 2, "--expert NAME and --data FILE are needed, or --feedback")
    fails(
        in_process("router", "add", "--router", out, "--feedback", said, "--expert", "x"), 2, "--feedback goes without"
    )


def test_labels_by_loss(tmp_path: Path, make_artifact: Callable[..., Artifact]) -> None:
    """Two experts that differ from the base in opposite ways label the pairs; their hashes end in the router."""
    pair = make_pair(tmp_path / "models", relative_delta=0.05)
    first = make_artifact(pair, out="first").path
    second = make_pair(tmp_path / "other", seed=5)[1]
    unlabelled = [
        {"prompt": item["prompt"], "response": item["prompt"][:12]}
        for item in [*lines("maths", 60), *lines("code", 60)]
    ]
    data = write(tmp_path / "pairs.jsonl", unlabelled)
    made = in_process(
        "train-router", "--backend", "tfidf", "--data", data, "--auto-label", "--base", pair[0],
        "--artifact", f"one={first}", "--artifact", f"two={second}", "--target-precision", 0.5,
        "--out", tmp_path / "router",
    )  # fmt: skip
    assert "labelled by loss: one " in made.stderr, made.stderr
    if made.returncode == 0:
        experts = json.loads((tmp_path / "router" / "router.json").read_text())["experts"]
        assert experts == {"one": file_digest(first / "meswitch.json"), "two": None}
    else:  # random models: one of the two may win too few prompts, or nothing be learnable
        fails(made, 1, "error: ")


def test_hashes_of_experts_given_by_file(
    tmp_path: Path, pair: tuple[Path, Path], make_artifact: Callable[..., Artifact]
) -> None:
    artifact = make_artifact(pair).path
    files = {name: write(tmp_path / f"{name}.jsonl", lines(name, 40)) for name in ("maths", "code")}
    made = in_process(
        "train-router", "--backend", "tfidf", "--expert", f"maths={files['maths']}", "--expert",
        f"code={files['code']}", "--artifact", f"maths={artifact}", "--fallback", "code", "--json",
        "--out", tmp_path / "router",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["test"]["accuracy"]["value"] > 0.9
    manifest = json.loads((tmp_path / "router" / "router.json").read_text())
    assert manifest["experts"] == {"code": None, "maths": file_digest(artifact / "meswitch.json")}
    assert manifest["fallback"] == "code"


def test_the_next_commands_can_be_typed(
    tmp_path: Path, pair: tuple[Path, Path], make_artifact: Callable[..., Artifact]
) -> None:
    artifact = make_artifact(pair).path
    data = write(tmp_path / "data.jsonl", [*lines("maths", 30), *lines("code", 30)])
    given = ("--backend", "tfidf", "--data", data, "--artifact", f"maths={artifact}", "--out", tmp_path / "router")
    made = in_process("train-router", *given)
    assert made.returncode == 0, made.stderr
    asked, served = map(shlex.split, made.stderr.split("next:\n")[1].splitlines())
    decided = in_process(*asked[1:])
    assert decided.returncode == 0 and "nearest known prompts" in decided.stdout, decided.stderr
    experts = ["--expert", "code=ARTIFACT", "--expert", f"maths={artifact}"]
    assert served == ["meswitch", "serve", "--base", "BASE", *experts, "--router", str(tmp_path / "router")]


def test_mistakes_end_in_one_line(router: Path, base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = make_pair(tmp_path / "other", seed=9, num_hidden_layers=4)[0]
    one = write(tmp_path / "one.jsonl", lines("maths", 30))
    few = write(tmp_path / "few.jsonl", [*lines("maths", 30), *lines("code", 3)])
    twice = write(tmp_path / "twice.jsonl", [*lines("maths", 30), lines("maths", 1)[0] | {"domain": "code"}])
    train = ("train-router", "--base", base, "--out", out)
    fails(in_process(*train), 2, "--data FILE or --expert NAME=FILE is needed")
    fails(in_process(*train, "--expert", "maths"), 2, "must be NAME=PATH")
    fails(in_process(*train, "--data", one), 1, "at least two domains; the data has 'maths'")
    fails(in_process(*train, "--data", few), 1, "domain 'code' has 3 different prompts")
    fails(in_process(*train, "--data", twice), 1, "line 31: the same prompt is 'code' here and 'maths' at")
    fails(in_process(*train, "--data", data, "--layer", 9), 1, "has 4 decoder layers, layer 9")
    fails(in_process(*train, "--data", data, "--fallback", "law"), 1, "fallback 'law' is not one of base, code, maths")
    fails(in_process("train-router", "--data", data, "--out", out), 2, "--base is needed")
    fails(in_process(*train, "--data", data, "--auto-label"), 2, "--auto-label needs the experts")
    fails(in_process("route", "--router", router, "x"), 1, "reads the hidden states of its base", "--base")
    fails(in_process("route", "--router", router, "--base", other, "x"), 1, "the router was made for another base")
    fails(in_process("route", "--router", tmp_path, "--base", base, "x"), 1, "not a router: it has no router.json")
    assert not out.exists()


@pytest.mark.zoo
def test_a_probe_of_the_real_base(tmp_path: Path) -> None:
    """Held-out items of held-out templates, through the quick family's base."""
    family = zoo.build(quick=True)

    def items(part: str, count: int) -> list[dict[str, str]]:
        return [
            {"prompt": item["prompt"], "domain": name, "group": item["template"]}
            for name in zoo.EXPERTS
            for item in zoo.items(name, part, quick=True)[:count]
        ]

    made = meswitch(
        "train-router", "--base", family.base, "--data", write(tmp_path / "train.jsonl", items("train", 30)),
        "--layer", 5, "--max-tokens", 64, "--out", tmp_path / "router",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    held_out = write(tmp_path / "report.jsonl", items("report", 15))
    measured = meswitch(
        "router", "eval", "--router", tmp_path / "router", "--base", family.base, "--data", held_out, "--json"
    )
    assert json.loads(measured.stdout)["test"]["accuracy"]["value"] >= 0.9
