"""Greedy answers against transformers' own, one prompt at a time; what is right, what is compared, and the table."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch_cli.errors import EvaluationError, UsageError
from meswitch_cli.evaluation.exact_match import exact_match, final_answer, greedy_tokens
from meswitch_cli.evaluation.figures import EXACT_MATCH
from meswitch_cli.evaluation.job import Request
from meswitch_cli.evaluation.markdown import ANSWER_COLUMNS, markdown
from meswitch_cli.evaluation.prompts import encode_set, read_set
from meswitch_cli.evaluation.run import evaluate
from zoo.tiny import Pair

PROMPTS = [[5, 9, 30], [7], [4, 4, 8, 61, 90, 12, 33], [11, 12]]
MOST = 6


def lines(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items))
    return path


@pytest.fixture(scope="module")
def model(pair: Pair) -> object:
    return AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()


def alone(model: object, prompt: list[int]) -> list[int]:
    """The likeliest tokens one by one, without cache, batch or padding."""
    tokens = list(prompt)
    for _ in range(MOST):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))  # type: ignore[operator]
    return tokens[len(prompt) :]


def test_a_batch_answers_as_each_prompt_alone_and_stops_where_it_should(model: object) -> None:
    wanted = [alone(model, prompt) for prompt in PROMPTS]
    assert greedy_tokens(model, PROMPTS, ends=[], most=MOST, context=64) == wanted
    end = wanted[2][3]
    cut = [row[: row.index(end)] if end in row else row for row in wanted]
    assert greedy_tokens(model, PROMPTS, ends=[end], most=MOST, context=64) == cut and len(cut[2]) < MOST
    assert greedy_tokens(model, PROMPTS[:1], ends=[], most=MOST, context=5) == [wanted[0][:2]]


def test_what_cannot_be_answered_is_named(model: object, pair: Pair) -> None:
    with pytest.raises(EvaluationError, match="embedding rows, the prompts use token 100000"):
        greedy_tokens(model, [[100000]], ends=[], most=1, context=64)
    broken = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        greedy_tokens(broken, [[5, 6]], ends=[], most=1, context=64)


def test_the_final_answer() -> None:
    assert final_answer(" so 3 + 4\n#### 5\n#### 7 \n") == "7"
    assert final_answer("  Rome\n") == "Rome" and final_answer("") == ""


def test_lines_with_an_answer(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        [
            {"prompt": "two plus two", "response": "that is\n#### 4", "answer": "4"},
            {"prompt": "three", "answer": "3"},
            {"prompt": "why", "response": "because"},
        ],
    )
    data = read_set(path)
    assert data.answers == ("4", "3", None) and data.has_answers
    assert [turns[-1]["content"] for turns in data.conversations] == ["that is\n#### 4", "3", "because"]


def test_right_is_the_line_s_answer(model: object, pair: Pair, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    questions = [{"prompt": f"what is {n}", "answer": "no"} for n in range(5)]
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[attr-defined]

    def answered(items: list[dict[str, str]], **options: object) -> object:
        data = read_set(lines(tmp_path / "q.jsonl", items))
        encoded = encode_set(data, tokenizer, vocabulary=vocabulary, context=64)
        return exact_match(model, tokenizer, data, encoded, ends=[], most=4, context=64, **options)  # type: ignore[arg-type]

    first = answered(questions)
    texts = [document.answer for document in first.documents]  # type: ignore[attr-defined]
    known = [item | {"answer": f" {text} "} for item, text in zip(questions[:3], texts[:3], strict=True)]
    known += questions[3:]
    assert all(text and text != "no" for text in texts)
    run = answered(known)
    assert [item.scores[EXACT_MATCH] for item in run.documents] == [1, 1, 1, 0, 0]  # type: ignore[attr-defined]
    # A reader of one's own sees the example's number.
    own = answered(questions, answer_of=lambda number, text: "no" if number == 4 else text)
    assert [item.scores[EXACT_MATCH] for item in own.documents] == [0, 0, 0, 0, 1]  # type: ignore[attr-defined]


def test_the_report_has_exact_match_beside_kl(pair: Pair, tmp_path: Path) -> None:
    items = [{"prompt": f"what is {n} plus two", "response": f"{n + 2}", "answer": f"{n + 2}"} for n in range(6)]
    found = {}
    for out, items_of in (("first", items), ("second", None)):
        if items_of is None:  # the full expert's own answers: it is right, and whoever answers otherwise has lost
            samples = [json.loads(line) for line in (tmp_path / "first" / "samples.jsonl").read_text().splitlines()]
            own = {item["number"]: item for item in samples if item["model"] == "expert"}
            items_of = [item | {"answer": own[n]["answer"] or "nothing"} for n, item in enumerate(items)]
        found[out] = evaluate(
            Request(
                base=str(pair[0]),
                experts=(str(pair[1]),),
                baselines=("bitdelta", "meswitch:bits=4,embedding=16"),
                texts=(str(lines(tmp_path / "sums.jsonl", items_of)),),
                out=tmp_path / out,
                exact_match=True,
                max_new_tokens=5,
            )
        ).to_dict()
    report = found["second"]
    assert report["complete"] and not report["errors"]
    scores = {row["model"]: row for row in report["tasks"]}
    assert scores["expert"]["score"] == 1
    assert scores.keys() == {
        "base",
        "expert",
        "bitdelta",
        "meswitch:bits=4,embedding=16",
    }
    for row in report["comparisons"]:
        if row["role"] == "full expert":
            assert (row["task"], row["metric"]) == ("sums", EXACT_MATCH)
            assert row["same_answers"] == 6 - row["lost"] and row["gained"] == 0
            assert row["difference"] == pytest.approx(-row["lost"] / 6) and row["test"] == "mcnemar"
    table = next(part for part in markdown(report).split("## ") if part.startswith("Fidelity to expert"))
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[-6:-1]] == list(ANSWER_COLUMNS)
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[-6:-1]] for row in rows}
    assert cells["full expert"][:2] == ["6 of 6", "100"] and cells["base"][0].endswith(" of 6")
    ours = next(row for row in report["comparisons"] if row["model"] == "bitdelta" and row["role"] == "full expert")
    assert cells["bitdelta"][:3] == [
        f"{6 - ours['lost']} of 6", f"{100 * ours['same_answers'] / 6:.1f}", f"−{ours['lost']} +0",
    ]  # fmt: skip
    assert "right" not in markdown(report | {"tasks": [], "comparisons": []})


def test_exact_match_needs_answers(pair: Pair, tmp_path: Path) -> None:
    request = {"base": str(pair[0]), "experts": (str(pair[1]),), "baselines": ("bitdelta",), "exact_match": True}
    with pytest.raises(UsageError, match='prompts of --text that have an "answer"'):
        Request(**request, tasks=("x",), out=tmp_path / "out")  # type: ignore[arg-type]
    path = lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UsageError, match='no line of --text has an "answer"'):
        evaluate(Request(**request, texts=(str(path),), out=tmp_path / "out"))  # type: ignore[arg-type]
