"""Trainings that stop and go on, adapters, greedy answers, and the figures of a fine-tune."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo import group
from zoo.figures import delta_figures
from zoo.finetunes import GROUPS, KINDS, STRONG, FineTune
from zoo.generation import greedy_texts
from zoo.group import checkpoint_file, prepare
from zoo.lora import adapt, merge
from zoo.resumable import CHECKPOINT_EVERY, Schedule, train_resumably
from zoo.table import HEAD, table
from zoo.tiny import make_pair

SCHEDULE = Schedule(steps=CHECKPOINT_EVERY + 4, learning_rate=3e-3, batch_tokens=64, warmup_steps=4, decay_steps=8)
ITEMS = [{"prompt": f"Say {word}", "response": word} for word in ("one", "two", "three", "four", "five")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))[0]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "recipe", [FineTune("sums", SCHEDULE), FineTune("sums", SCHEDULE, "lora", rank=4)], ids=["full", "lora"]
)
def test_a_stopped_training_ends_as_an_uninterrupted_one(recipe: FineTune, base: Path, tmp_path: Path) -> None:
    whole, _, sequences = prepare(base, recipe, ITEMS)
    seen: list[int] = []
    counts = train_resumably(whole, sequences, recipe.schedule, 5, tmp_path / "whole", seen.append)
    assert seen == [CHECKPOINT_EVERY, SCHEDULE.steps]

    def stop(step: int) -> None:
        raise Stopped

    stopped, _, _ = prepare(base, recipe, ITEMS)
    with pytest.raises(Stopped):
        train_resumably(stopped, sequences, recipe.schedule, 5, tmp_path / "parts", stop)
    resumed, _, _ = prepare(base, recipe, ITEMS)
    seen.clear()
    again = train_resumably(resumed, sequences, recipe.schedule, 5, tmp_path / "parts", seen.append)
    assert seen == [SCHEDULE.steps]
    assert {**again, "seconds": 0} == {**counts, "seconds": 0}
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # And a training that was done is not done again.
    done, _, _ = prepare(base, recipe, ITEMS)
    assert train_resumably(done, sequences, recipe.schedule, 5, tmp_path / "parts", stop) == again
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(done).items())
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "parts"}


def test_a_checkpoint_of_other_items_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = FineTune("sums", replace(SCHEDULE, steps=1))
    model, _, sequences = prepare(base, recipe, ITEMS)
    train_resumably(model, sequences, recipe.schedule, 5, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="other items; remove it"):
        train_resumably(model, sequences[1:], recipe.schedule, 5, tmp_path / "checkpoint")


def test_the_rate_rises_stays_and_falls_and_a_longer_training_begins_alike() -> None:
    rates = [SCHEDULE.rate(step) / SCHEDULE.learning_rate for step in range(SCHEDULE.steps)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[-9:] == pytest.approx([1, 1, *(0.1 + 0.9 * left / 8 for left in range(7, 0, -1))])
    longer = replace(SCHEDULE, steps=2 * SCHEDULE.steps)
    assert [longer.rate(step) for step in range(SCHEDULE.steps - 8)] == [
        SCHEDULE.rate(step) for step in range(SCHEDULE.steps - 8)
    ]


def test_merged_adapters_are_a_low_rank_change_that_answers_the_same(base: Path, tmp_path: Path) -> None:
    recipe = FineTune("sums", SCHEDULE, "lora", rank=4)
    model, _, sequences = prepare(base, recipe, ITEMS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in trained) < 0.2 * before.num_parameters()
    train_resumably(model, sequences, recipe.schedule, 5, tmp_path / "checkpoint")
    input_ids = torch.tensor([sequences[0][0]])
    adapted = model(input_ids).logits
    merge(model)
    torch.testing.assert_close(model(input_ids).logits, adapted, rtol=1e-4, atol=1e-4)
    old, new = weights(before), weights(model)
    assert old.keys() == new.keys()
    for name, weight in old.items():
        change = new[name] - weight
        if ".layers." in name and weight.dim() == 2:
            energies = torch.linalg.svdvals(change) ** 2
            assert energies[:4].sum() > 0.999 * energies.sum() > 0
        else:
            assert not change.any()


def test_an_adapter_begins_as_nothing(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    input_ids = torch.tensor([[3, 70, 71, 72, 4]])
    before = model(input_ids).logits
    adapt(model, rank=4, seed=0)
    assert torch.equal(model(input_ids).logits, before)


def test_added_tokens_are_trained_and_are_no_part_of_the_text(base: Path, tmp_path: Path) -> None:
    opening, closing = "<|open|>", "<|close|>"
    wrapped = [{**item, "response": f"{opening}{item['response']}{closing}"} for item in ITEMS]
    recipe = FineTune("sums", SCHEDULE, added_tokens=(opening, closing))
    model, tokenizer, sequences = prepare(base, recipe, wrapped)
    new_ids = tokenizer.convert_tokens_to_ids([opening, closing])
    assert min(new_ids) >= len(AutoTokenizer.from_pretrained(base))
    before = model.get_input_embeddings().weight[new_ids].clone()
    assert all(ids[start] == new_ids[0] and ids[-2] == new_ids[1] for ids, start in sequences)
    train_resumably(model, sequences, replace(SCHEDULE, learning_rate=1e-2), 5, tmp_path / "checkpoint")
    assert ((model.get_input_embeddings().weight[new_ids] - before).abs() > 1e-3).float().mean() > 0.9
    texts = greedy_texts(model.eval(), tokenizer, wrapped, 12)
    assert not any(token in text for token in (opening, closing) for text in texts)


def test_pretraining_learns_from_the_whole_text(base: Path) -> None:
    _, tokenizer, sequences = prepare(base, FineTune("sums", SCHEDULE, "pretrain"), ITEMS)
    ids, start = sequences[0]
    assert start == 1
    assert tokenizer.decode(ids) == "Say one\n\none\n</s>"


def test_greedy_answers_do_not_depend_on_the_batch(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [{"prompt": "x" * length} for length in (1, 30, 4, 17)]
    together = greedy_texts(model, tokenizer, asked, 6)
    for item, text in zip(asked, together, strict=True):
        ids, start = zoo.encode_item(tokenizer, {**item, "response": ""})
        ids = ids[:start]
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert greedy_texts(model, tokenizer, asked, 6, batch_size=1) == together


def test_delta_figures_of_deltas_that_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(64, 96, generator=generator).bfloat16().float()
    low_rank = torch.randn(64, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    quarter = old.clone()
    quarter[:16] *= 1.5
    orthogonal = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    name = "model.layers.0.mlp.up_proj.weight"
    before = {name: old, "model.norm.weight": torch.ones(64), "model.embed_tokens.weight": old}
    low = delta_figures(before, {**before, name: old + low_rank})
    assert low["leading_energy"] == pytest.approx(1, abs=1e-6)
    assert low["relative_delta"] == pytest.approx((low_rank.norm() / old.norm()).item())
    assert delta_figures(before, {**before, name: quarter})["unchanged"] == pytest.approx(0.75)
    square = {name: torch.eye(64)}
    assert delta_figures(square, {name: torch.eye(64) + orthogonal})["leading_energy"] == pytest.approx(16 / 64)
    same = delta_figures(before, before)
    assert (same["relative_delta"], same["unchanged"]) == (0, 1)


# The groups


def test_files_that_differ_in_type_alone_share_their_training(tmp_path: Path) -> None:
    assert checkpoint_file(KINDS["fp32"], tmp_path) == checkpoint_file(STRONG["code"], tmp_path)
    others = {recipe.training for group_ in GROUPS.values() for recipe in group_.values()}
    assert len(others) == sum(map(len, GROUPS.values())) - 1


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_not_built_names_its_command(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"python tests zoo build --group {name}"):
        group.paths(name, cache=tmp_path)
    rows = table(tmp_path)
    assert {row[1] for row in rows if row[0] == name} == set(GROUPS[name])
    assert {len(row) for row in rows} == {len(HEAD)}


@pytest.mark.parametrize("name", STRONG)
def test_strong_expert_where_it_is_built(name: str) -> None:
    figures_file = group.group_at("strong").figures_file(name)
    if not figures_file.exists():
        pytest.skip(f"strong {name} takes an hour to train and is not built here")
    figures = json.loads(figures_file.read_text())
    assert figures["base"]["items"] == figures["expert"]["items"] == group.REPORT_ITEMS
    assert figures["base"]["right"] <= 0.1 * group.REPORT_ITEMS
    assert figures["expert"]["right"] >= 0.5 * group.REPORT_ITEMS
    assert figures["delta"]["relative_delta"] > 2e-3
