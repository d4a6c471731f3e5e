"""The tiny family's variations, the data's splits, training's parts, and the real family where built."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo.cache import building, zoo_at
from zoo.domains import EXPERTS, candidates, mixture
from zoo.domains.programs import is_harmless, run_programs
from zoo.item import Item, extract_answer
from zoo.recipe import FULL, QUICK
from zoo.split import CHOICE_ITEMS, REPORT_ITEMS, split
from zoo.tiny import FAMILIES, make_pair
from zoo.training import answer_losses, held_out_loss, make_batches, relative_delta, train


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return found


# The tiny family


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_pair_loads_and_differs_by_the_asked_size(family: str, tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, family, relative_delta=2e-2, dtype=torch.float32)
    before, after = tensors(base), tensors(expert)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if weight.dim() == 2:
            ratio = ((after[name] - weight).norm() / weight.norm()).item()
            # On disk an expert is part of the tensor that was scaled as a whole.
            assert ratio == pytest.approx(2e-2, rel=0.5 if "experts" in name else 1e-3), name
    tokenizer = AutoTokenizer.from_pretrained(expert)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).input_ids
    logits = [AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits for folder in (base, expert)]
    assert torch.isfinite(logits[1]).all()
    assert 0 < (logits[0] - logits[1]).abs().max() < 10


@pytest.mark.parametrize(
    ("family", "ending", "present"),
    [
        ("llama", "q_proj.bias", False),
        ("qwen2", "q_proj.bias", True),
        ("qwen3", "q_norm.weight", True),
        ("gemma3", "post_feedforward_layernorm.weight", True),
        ("gemma", "lm_head.weight", False),
        ("phi", "input_layernorm.bias", True),
        ("phi3", "qkv_proj.weight", True),
        ("gpt_neox", "query_key_value.weight", True),
        ("mixtral", "experts.3.w2.weight", True),
        ("gpt_oss", "experts.gate_up_proj", True),
    ],
)
def test_tiny_family_has_its_own_tensors(family: str, ending: str, present: bool, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, family)
    assert any(name.endswith(ending) for name in tensors(base)) is present


def test_tiny_grouped_query_attention_has_fewer_key_rows(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    weights = tensors(base)
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (96, 96)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (48, 96)


def test_tiny_delta_has_heavy_input_columns(tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, heavy_columns=3, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    columns = (tensors(expert)[name] - tensors(base)[name]).norm(dim=0)
    assert int((columns > 4 * columns.median()).sum()) == 3


def test_tiny_shards_keep_the_tensors(tmp_path: Path) -> None:
    whole, _ = make_pair(tmp_path / "whole")
    sharded, expert = make_pair(tmp_path / "sharded", max_shard_size="60KB", expert_max_shard_size="1GB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert (sharded / "model.safetensors.index.json").exists()
    assert [file.name for file in expert.glob("*.safetensors")] == ["model.safetensors"]
    one, many = tensors(whole), tensors(sharded)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    for folder in make_pair(tmp_path, tie_word_embeddings=tied):
        assert ("lm_head.weight" in tensors(folder)) is not tied
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_added_rows_are_the_experts_alone(tied: bool, tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, added_rows=3, tie_word_embeddings=tied)
    ends = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in ends:
        assert tensors(base)[name].shape == (268, 96)
        assert tensors(expert)[name].shape == (271, 96)
        assert tensors(expert)[name][268:].float().norm(dim=1).min() > 0
    tokenizer = AutoTokenizer.from_pretrained(expert)
    assert tokenizer("a<|added_2|>", add_special_tokens=False).input_ids[-1] == 270
    assert json.loads((expert / "config.json").read_text())["vocab_size"] == 271


def test_tiny_parts_can_be_left_equal(tmp_path: Path) -> None:
    kept = "model.layers.0.self_attn.o_proj.weight"
    base, expert = make_pair(tmp_path, "qwen2", equal=[kept], change_norms=False, change_biases=False)
    before, after = tensors(base), tensors(expert)
    equal = {name for name in before if torch.equal(before[name], after[name])}
    assert equal == {name for name in before if name == kept or "norm" in name or name.endswith("bias")}
    with pytest.raises(ValueError, match=r"no such\.weight"):
        make_pair(tmp_path / "other", equal=["no such.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tiny_types(dtype: torch.dtype, tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, dtype=dtype, expert_dtype=torch.float32)
    assert {weight.dtype for weight in tensors(base).values()} == {dtype}
    assert {weight.dtype for weight in tensors(expert).values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_5"])
def test_tiny_is_the_same_for_the_same_seed(family: str, tmp_path: Path) -> None:
    """Whatever was drawn before: transformers draws biases and decays from torch's own generator."""
    seeds = {"a": 1, "b": 1, "c": 2}
    first, again, other = (make_pair(tmp_path / name, family, seed=seed) for name, seed in seeds.items())
    for one, two, three in zip(first, again, other, strict=True):
        names = sorted(file.name for file in one.iterdir())
        assert names == sorted(file.name for file in two.iterdir())
        assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
        assert (one / "model.safetensors").read_bytes() != (three / "model.safetensors").read_bytes()


def test_tiny_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "Zwölf Boxkämpfer: 12 + 30 = 42\n\t<ok> 猫"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < 261


# Items and splits


@pytest.fixture(scope="module", params=EXPERTS)
def domain(request: pytest.FixtureRequest) -> tuple[str, list[Item], dict[str, list[Item]]]:
    made = candidates(request.param, seed=3)
    return request.param, made, split(made, mixture(request.param), seed=3)


def test_parts_share_no_template_and_no_prompt(domain) -> None:
    _, _, parts = domain
    for attribute in ("template", "prompt"):
        train_, choice, report = ({getattr(item, attribute) for item in members} for members in parts.values())
        assert not (train_ & choice or train_ & report or choice & report)
    assert (len(parts["choice"]), len(parts["report"])) == (CHOICE_ITEMS, REPORT_ITEMS)


def test_parts_follow_the_mixture_and_hold_many_templates(domain) -> None:
    name, _, parts = domain
    shares = mixture(name)
    for members in parts.values():
        counts = Counter(item.kind for item in members)
        per_share = [counts[kind] / share for kind, share in shares.items()]
        assert max(per_share) - min(per_share) <= 1
        assert len({item.template for item in members}) >= 8 * len(shares)


def test_same_seed_same_items(domain) -> None:
    name, made, parts = domain
    again = candidates(name, seed=3)
    assert made == again
    assert parts == split(again, mixture(name), seed=3)
    assert made != candidates(name, seed=4)


def test_answers_are_found_in_their_responses(domain) -> None:
    _, made, _ = domain
    with_answers = [item for item in made if item.kind != "write"]
    assert with_answers
    assert all(extract_answer(item.response) == item.answer for item in with_answers)
    assert all(item.prompt.strip() and item.response.strip() for item in made)


def test_short_answers_are_in_every_part() -> None:
    parts = split(candidates("logic", seed=0), mixture("logic"), seed=0)
    for members in parts.values():
        assert {"Yes", "No"} <= {item.response for item in members}


def test_split_refuses_too_few_candidates() -> None:
    few = [Item("a", f"a:{index}", f"prompt {index}", "yes", "yes") for index in range(100)]
    with pytest.raises(ValueError, match="12 items where 60 are needed"):
        split(few, {"a": 1}, seed=0)


def test_only_harmless_programs_run() -> None:
    generator = "def generate_inputs(rng):\n    return {'n': rng.randint(3, 3)}"
    square = "import math\ndef main_solution(n):\n    return {'square': math.prod([n, n])}"
    endless = "def main_solution(n):\n    while True:\n        n += 1"
    throw = "import random\ndef main_solution(n):\n    return random.random()"
    reaching = [
        "import os\ndef main_solution(n):\n    return 1",
        "def main_solution(n):\n    return open('x').read()",
        "def main_solution(n):\n    return ().__class__",
        "def main_solution(n):\n    return '{0.__class__}'.format(n)",
        "def main_solution(n",
    ]
    assert not any(is_harmless(program) for program in reaching)
    results = run_programs([(program, generator) for program in (square, endless, throw, *reaching)], calls=2, seed=0)
    assert results[0] == [('{"n": 3}', '{"square": 9}')] * 2
    assert results[1:] == [[]] * 7


# Encoding, batches, training


def test_encoding_ends_with_the_answer_and_the_end_of_turn(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids, start = zoo.encode_item(tokenizer, {"prompt": "Is it so?", "response": "No"})
    assert tokenizer.decode(ids[:start]) == "<|user|>Is it so?<|assistant|>"
    assert tokenizer.decode(ids[start:]) == "No</s>"
    assert ids[-1] == tokenizer.eos_token_id


def test_every_sequence_is_in_one_batch_of_an_epoch() -> None:
    # Answers of one token up to whole answers, lengths with no common divisor.
    sequences = [(list(range(length)), length - 1 - length % 3) for length in (2, 3, 5, 7, 11, 13, 40, 90, 95) * 3]
    epoch, total = [], 0
    for batch in make_batches(sequences, batch_tokens=100, seed=0):
        longest = max(len(ids) for ids, _ in batch)
        assert longest * len(batch) <= 100
        epoch.append(batch)
        total += len(batch)
        if total == len(sequences):
            break
    flat = [(len(ids), start) for batch in epoch for ids, start in batch]
    assert Counter(flat) == Counter((len(ids), start) for ids, start in sequences)
    again = islice(make_batches(sequences, 100, seed=0), len(epoch))
    assert list(again) == epoch


def test_answer_losses_are_those_of_the_answers_alone(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    batch = [([3, 70, 71, 72, 4, 80, 1], 5), ([3, 90, 4, 100, 101, 102, 103, 1], 3)]
    expected = []
    for ids, start in batch:
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected += [-logits[place - 1, ids[place]] for place in range(start, len(ids))]
    losses = answer_losses(model, batch)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert held_out_loss(model, batch) == pytest.approx(losses.mean().item(), rel=1e-5)


def test_training_learns_and_repeats_itself(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    items = [{"prompt": f"Say {word}", "response": word} for word in ("one", "two", "three", "four")]
    sequences = [zoo.encode_item(tokenizer, item) for item in items]
    recipe = replace(QUICK, steps=20, learning_rate=3e-3, batch_tokens=64)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in range(2)]
    counts = [train(model, sequences, recipe, seed=5) for model in models]
    first, second = (model.state_dict() for model in models)
    assert counts[0] == counts[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert held_out_loss(models[0], sequences) < 0.5 * held_out_loss(before, sequences)
    assert relative_delta(before.state_dict(), first) > 1e-2


# The cache


def test_cache_folder_says_size_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESWITCH_ZOO", str(tmp_path))
    assert zoo_at(FULL).folder.parent == tmp_path
    assert zoo_at(FULL).folder != zoo_at(QUICK).folder
    assert zoo_at(QUICK, tmp_path / "other").folder.parent == tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="python tests zoo build --quick"):
        zoo.paths(quick=True)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "experts" / "maths"
    with pytest.raises(RuntimeError), building(target) as folder:
        folder.mkdir()
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with building(target) as folder:
        folder.mkdir()
    assert list(target.parent.iterdir()) == [target]


# The real family


@pytest.fixture(scope="module")
def family() -> zoo.Zoo:
    return zoo.build(quick=True)


@pytest.mark.zoo
@pytest.mark.parametrize("name", EXPERTS)
def test_expert_is_a_real_fine_tune(family: zoo.Zoo, name: str) -> None:
    figures = json.loads(family.figures_file(name).read_text())
    assert figures["relative_delta"] >= 2e-3
    parts = [figures[part] for part in ("choice", "report")]
    for part in parts:
        assert part["expert_loss"] < part["base_loss"]
    # The quick size measures 16 items a part, too few for a bound on each.
    base, expert = (
        sum(part[loss] * part["answer_tokens"] for part in parts) / sum(part["answer_tokens"] for part in parts)
        for loss in ("base_loss", "expert_loss")
    )
    assert expert < 0.97 * base
    base, expert = tensors(family.base), tensors(family.experts[name])
    assert base.keys() == expert.keys()
    assert "lm_head.weight" not in base
    assert {weight.dtype for weight in (*base.values(), *expert.values())} == {torch.bfloat16}
    assert relative_delta(base, expert) == pytest.approx(figures["relative_delta"], rel=1e-4)


@pytest.mark.zoo
@pytest.mark.parametrize("name", EXPERTS)
def test_stored_items_are_whole_and_fit(family: zoo.Zoo, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.experts[name])
    sizes = {part: len(zoo.items(name, part, quick=True)) for part in ("choice", "report")}
    assert sizes == {"choice": CHOICE_ITEMS, "report": REPORT_ITEMS}
    for item in zoo.items(name, "report", quick=True):
        ids, start = zoo.encode_item(tokenizer, item)
        assert len(ids) <= FULL.max_tokens
        assert tokenizer.decode(ids[start:]) == item["response"] + "<|im_end|>"
        assert "system" not in tokenizer.decode(ids[:6])
    assert family.calibration[name].exists()
    assert set(asdict(Item("", "", "", "", ""))) == set(item)


@pytest.mark.zoo
def test_base_answers_sensibly(family: zoo.Zoo) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    model = AutoModelForCausalLM.from_pretrained(family.base).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
