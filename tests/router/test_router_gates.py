"""The gate of neighbours, and the general prompts that it is drawn from: on features made by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from meswitch_cli.router.backends.contract import NULL
from meswitch_cli.router.decide.neighbours import NOBODY, distances_of, fit_neighbours
from meswitch_cli.router.decide.null_class import joint_distances, null_log_odds
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store.features import GENERAL, FeatureStore
from meswitch_cli.router.train.adoption import UNCLEAR, adopt
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.doubts import doubts, twins
from meswitch_cli.router.train.gating import draw_gate, separating_line
from meswitch_cli.router.train.general import General, general_prompts
from meswitch_cli.router.train.generalising import Known, fit_generalising
from meswitch_cli.router.train.measures import auroc
from meswitch_cli.router.train.null_fitting import unseen_log_odds
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import train_router

from .conftest import examples, sentences

SIZE = 48


def direction(index: int) -> torch.Tensor:
    return torch.eye(SIZE)[index]


def cloud(centre: torch.Tensor, count: int, seed: int, spread: float = 0.3) -> torch.Tensor:
    return centre + spread * torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def made_store() -> FeatureStore:
    """Two experts at 4·e0 and 4·e1, who only know one kind of prompt each; of 26 general fields the first two are
    theirs, put otherwise (the fourth direction), each in two parts; the others lie along directions of their own."""
    style = 0.8 * direction(3)
    blocks: list[tuple[torch.Tensor, int, int, int, int]] = []  # features, label, part, field, group
    for label in (0, 1):
        for part, count in ((0, 40), (1, 10), (2, 10), (3, 10)):
            blocks.append((cloud(4 * direction(label) - style, count, 10 * label + part), label, part, -1, -1))
        for half in (0, 1):
            centre = 2 * direction(label) + style + 0.5 * direction(40 + half)
            blocks.append((cloud(centre, 12, 40 + 2 * label + half), NULL, GENERAL, 2 * label + half, label))
    for field in range(24):
        centre = 2 * direction(5 + field) + style * (field % 2)
        blocks.append((cloud(centre, 12, 60 + field), NULL, GENERAL, 4 + field, 2 + field))
    features = torch.cat([block[0] for block in blocks])
    column = [torch.cat([torch.full((len(block[0]),), block[at]) for block in blocks]) for at in range(1, 5)]
    labels, parts, fields, groups = column
    targets = torch.zeros(len(labels), 2)
    targets[labels >= 0] = torch.eye(2)[labels[labels >= 0]]
    lengths = torch.full((len(labels),), 100)
    return FeatureStore(
        features, targets, labels, parts.to(torch.uint8), torch.arange(len(labels)), lengths, fields, groups
    )


def test_fields_are_adopted_by_the_expert_they_point_at() -> None:
    known = Known.of(made_store(), 2)
    owners = {int(group): set(known.owners[known.store.groups == group].tolist()) for group in range(26)}
    assert owners[0] == {0} and owners[1] == {1}
    assert all(owners[group] == {NOBODY} for group in range(2, 26))
    assert int(known.adopted.sum()) == 48 and int(known.foreign.sum()) == 288


def test_a_field_between_two_experts_is_nobody_s_and_teaches_nothing() -> None:
    store = made_store()
    middle = store.groups == 5
    store.features[middle] += 3 * (direction(0) + direction(1))
    known = Known.of(store, 2)
    assert set(known.owners[middle].tolist()) == {UNCLEAR}
    assert not (known.points & middle).any() and not (known.foreign & middle).any()


def test_length_alone_makes_no_field_an_expert_s() -> None:
    """The expert's prompts are long, and so are those of one field that has nothing else in common with them."""
    long = 3 * direction(7)
    groups = torch.arange(24).repeat_interleave(10)
    lengths = torch.where(groups < 3, 1000, 100)
    general = torch.cat([cloud(3 * direction(10 + field) + (field < 3) * long, 10, field) for field in range(24)])
    own = torch.cat([cloud(long + direction(0), 20, 3, 0.1), cloud(direction(1), 20, 4, 0.1)])
    labels = torch.tensor([0] * 20 + [1] * 20)
    own_lengths = torch.tensor([1000] * 20 + [100] * 20)
    owners = adopt(general, lengths, groups, own, own_lengths, labels, 2)
    assert set(owners.tolist()) == {NOBODY}
    blind = adopt(general, torch.full((240,), 100), groups, own, torch.full((40,), 100), labels, 2)
    assert 0 in blind.tolist()


def test_adopted_prompts_teach_the_head_another_style() -> None:
    """Prompts put as nobody's training prompts are: half a field is held out and answered rightly by the other half."""
    known = Known.of(made_store(), 2)
    fitted = fit_generalising(known, 2)
    assert torch.equal(fitted.scores.argmax(1), fitted.truth) and len(fitted.truth) == 48


def test_distances_by_hand() -> None:
    similarities = torch.tensor([[0.9, 0.7, 0.1, -0.1], [0.2, 0.0, 0.8, 1.0], [0.9, -torch.inf, 0.5, 0.5]])
    owners = torch.tensor([0, 1, NOBODY, NOBODY])
    expected = torch.tensor([(2 + 0.0 - 0.8) / 4, (2 + 0.9 - 0.1) / 4, (2 + 0.5 - (0.9 - 1) / 2) / 4])
    assert torch.allclose(distances_of(similarities, owners), expected)
    nobody = torch.full((4,), NOBODY)
    assert torch.allclose(distances_of(similarities[:1], nobody), torch.tensor([(2 + 0.8 + 1) / 4]))


def test_joint_distances_by_hand() -> None:
    """The nearest prompts say 0.7, two deviations beyond the middle, the null class even odds; then the other way."""
    near, scores = torch.tensor([0.7, 0.5]), torch.tensor([[0.0, 0.0, 0.6931472], [2.0, 2.0, 8.6931472]])
    found = joint_distances(near, null_log_odds(scores), torch.tensor([0.1, 3.0]))
    assert torch.allclose(found, torch.sigmoid(torch.tensor([1.0, 1.0])))


@pytest.mark.parametrize("whole", [False, True])
def test_the_gate_is_the_same_after_it_was_stored(whole: bool) -> None:
    store = made_store()
    gate = draw_gate(Known.of(store, 2), 2, 0).gate if whole else fit_neighbours(store.features, store.labels, seed=0)
    tensors = {name: tensor.clone() for name, tensor in gate.tensors().items()}
    again = type(gate).from_parts(tensors, gate.numbers())
    assert torch.equal(again.distances(store.features), gate.distances(store.features))
    assert gate.points.norm(dim=1).sub(1).abs().max() < 1e-2


def test_the_null_class_is_judged_on_fields_that_it_has_not_seen() -> None:
    store = made_store()
    known = Known.of(store, 2)
    drawn = draw_gate(known, 2, seed=0)
    odds = unseen_log_odds(known, drawn.gate.null, 2)
    assert (odds[known.foreign] > 0).float().mean() >= 0.95
    assert auroc(odds[known.adopted].double().numpy(), odds[known.foreign].double().numpy()) >= 0.97
    # With the field itself among what it learnt from it is surer.
    seen = null_log_odds(drawn.gate.null(store.features[known.foreign]))
    assert seen.median() > odds[known.foreign].median()


def test_lines_are_drawn_from_fields_that_the_gate_was_made_to_forget() -> None:
    known = Known.of(made_store(), 2)
    drawn = draw_gate(known, 2, seed=0)
    # With its own field among the neighbours a foreign prompt lies further off than a new field's prompt will.
    remembered = drawn.gate.distances(known.store.features[known.foreign])
    assert drawn.foreign.median() < remembered.median()
    assert 0 < drawn.gate.strict_threshold <= drawn.gate.threshold < 1
    assert (drawn.adopted <= drawn.gate.threshold).float().mean() >= 0.9
    assert (drawn.foreign > drawn.gate.threshold).float().mean() >= 0.9
    strange = cloud(4 * direction(45), 40, 99)
    assert (drawn.gate.distances(strange) > drawn.gate.threshold).float().mean() >= 0.9


def test_the_separating_line_is_in_the_middle_and_counts_sources_alike() -> None:
    inside, outside = torch.tensor([0.1, 0.2]), torch.tensor([0.6, 0.8])
    assert separating_line([inside], [outside]) == pytest.approx(0.4)
    # A hundred prompts of one source do not outvote two of another.
    many = torch.full((100,), 0.3)
    assert separating_line([inside], [outside, many]) == pytest.approx(0.25)
    assert separating_line([inside], [torch.tensor([0.15, 0.6, 0.7, 0.8])]) == pytest.approx(0.4)


def test_general_prompts_are_many_short_and_long_and_told_apart() -> None:
    prompts = general_prompts()
    assert len(prompts) >= 600 and len({item.digest for item in prompts}) == len(prompts)
    assert all(item.domain is None for item in prompts)
    counts = Counter(str(item.group).partition(":")[0] for item in prompts)
    assert len(counts) >= 40 and min(counts.values()) >= 5
    assert sum(len(item.text) > 200 for item in prompts) >= 60
    own = Example(prompts[3].text.upper(), "maths", "mine:1")
    assert len(General.without([own]).examples) == len(prompts) - 1


@pytest.mark.parametrize("count", [5, 12])
def test_a_few_prompts_make_a_router(count: int) -> None:
    data = gather(examples({"maths": count, "code": count}))
    router = train_router(data, TrainingSettings(backend="tfidf")).router
    assert [router.route(text, gate="off").expert for text in sentences("maths", 5, seed=3)] == ["maths"] * 5
    assert router.route("Which river is longer, the Nile or the Amazon?").expert == "base"


def test_modes_of_the_gate(tfidf_router: Router) -> None:
    """What `off` routes `normal` may refuse, and what that routes `strict` may; never the other way round."""
    prompts = [*sentences("maths", 20, seed=1), *sentences(None, 20, seed=1), "Who wrote Hamlet?", "Bake a cake."]
    features = tfidf_router.backend.features(prompts)
    routed = {
        mode: [item.verdict == "routed" for item in tfidf_router.model.judge(features, mode)]
        for mode in ("strict", "normal", "off")
    }
    assert all(routed["off"])
    assert all(loose or not tight for loose, tight in zip(routed["normal"], routed["strict"], strict=True))
    assert sum(routed["normal"][:20]) >= 18 and sum(routed["normal"][20:]) <= 3
    assert tfidf_router.route("Who wrote Hamlet?").reason == "out_of_domain"
    assert tfidf_router.route("Who wrote Hamlet?", gate="off").reason == "routed"
    own = Router(tfidf_router.backend, tfidf_router.model, gate="off")
    assert own.route("Who wrote Hamlet?").reason == "routed"
    assert own.route("Who wrote Hamlet?", gate="normal").reason == "out_of_domain"


def test_doubtful_prompts_and_twins_are_told(tfidf_router: Router) -> None:
    model, backend = tfidf_router.model, tfidf_router.backend
    sure, foreign = Example(sentences("maths", 1, seed=1)[0], "maths", ""), Example("Who wrote Hamlet?", "maths", "")
    null = Example("Bake a cake.", None, "")
    told = doubts(model, backend.features([item.text for item in (sure, foreign, null)]), [sure, foreign, null])
    assert told["count"] == 1 and told["prompts"][0]["prompt"] == foreign.text
    assert told["prompts"][0]["verdict"] == "out_of_domain"
    # Of the training part are some; all are known but for those of the other parts.
    known = [Example(text, "maths", "") for text in sentences("maths", 80)]
    new = [Example(text, "maths", "") for text in sentences("maths", 40, seed=5)]
    shares = [twins(model, backend.features([item.text for item in items]), items) for items in (known, new)]
    assert shares[0] is not None and shares[0] >= 0.5
    assert shares[1] is not None and shares[1] <= 0.1
    assert twins(model, backend.features([null.text]), [null]) is None
