"""Adding and removing experts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router import Router
from meswitch_cli.router.store.artifact import RouterArtifact, write_router
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.editing import add_expert, learn, remove_expert
from meswitch_cli.router.train.fitting import fit_model
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import TrainedRouter, train_router

from .conftest import COUNTS, examples, save, sentences

LoadProbe = Callable[[Path], Router]


def test_a_refit_of_the_same_data_is_the_same_model(trained_probe: TrainedRouter, probe_folder: Path) -> None:
    artifact = RouterArtifact.open(probe_folder)
    model = fit_model(artifact.manifest.labels, artifact.model.scaling, artifact.store(), target_precision=0.95, seed=0)
    assert torch.equal(model.head.weight, artifact.model.head.weight)
    assert model.numbers() == artifact.model.numbers()


def test_add_then_remove(probe_folder: Path, load_probe: LoadProbe) -> None:
    artifact = RouterArtifact.open(probe_folder)
    first = artifact.store()
    backend = load_probe(probe_folder).backend
    edit = add_expert(artifact, backend, "law", examples({"law": 160}), digest="d" * 64)
    edit.refuse_regression(0.1)
    assert edit.added is not None and edit.added["value"] > 0.9
    assert set(edit.before) == set(edit.after) == {"code", "maths"}
    assert all(edit.before[label]["value"] - edit.after[label]["value"] <= 0.1 for label in edit.before)
    written = write_router(probe_folder, edit.manifest, edit.model, None, edit.store, source=artifact, force=True)
    assert written.manifest.labels == ("code", "law", "maths")
    assert written.manifest.experts == {"code": None, "law": "d" * 64, "maths": None}
    assert written.manifest.split["added law"]["train"]["prompts"] == 88
    router = load_probe(probe_folder)
    law = [router.route(text) for seed in range(1, 7) for text in sentences("law", 30, seed=seed)]
    assert sum(max(item.probabilities, key=item.probabilities.__getitem__) == "law" for item in law) >= 150
    # Random weights tell general prompts from fields badly, so much confidence is asked for.
    assert {item.expert for item in law} == {"law", "base"}
    assert sum(item.expert == "law" for item in law) >= 90

    back = remove_expert(written, "law")
    assert back.manifest.labels == ("code", "maths")
    kept = back.store
    order = torch.argsort(kept.digests)
    assert torch.equal(kept.digests[order], torch.sort(first.digests).values)
    assert torch.equal(kept.features[order], first.features[torch.argsort(first.digests)])


def test_bad_additions_are_refused(probe_folder: Path, load_probe: LoadProbe) -> None:
    artifact = RouterArtifact.open(probe_folder)
    backend = load_probe(probe_folder).backend
    law = examples({"law": 30})
    with pytest.raises(RouterError, match="'maths' is in the router already"):
        add_expert(artifact, backend, "maths", law)
    with pytest.raises(RouterError, match="'base' cannot be an expert's name"):
        add_expert(artifact, backend, "base", law)
    with pytest.raises(RouterError, match="has 4 different prompts; at least 5"):
        add_expert(artifact, backend, "law", law[:4])
    known = Example(sentences("maths", 1)[0], None, "law.jsonl: line 3")
    with pytest.raises(RouterError, match=r"law.jsonl: line 3: this prompt is in the router already, as 'maths'"):
        add_expert(artifact, backend, "law", [*law, known])


def test_an_expert_that_takes_from_another_is_refused(probe_folder: Path, load_probe: LoadProbe) -> None:
    """The new expert's prompts are the old one's domain: one of the two must lose."""
    artifact = RouterArtifact.open(probe_folder)
    twin = [replace(item, domain="algebra") for item in examples({"maths": 80}, seed=4)]
    with pytest.raises(RouterError, match=r"would lose|no threshold reaches"):
        add_expert(artifact, load_probe(probe_folder).backend, "algebra", twin).refuse_regression(0.02)


def test_bad_removals_are_refused(probe_folder: Path) -> None:
    artifact = RouterArtifact.open(probe_folder)
    with pytest.raises(RouterError, match=r"'law' is not in the router \(code, maths\)"):
        remove_expert(artifact, "law")
    with pytest.raises(RouterError, match="one expert would be left"):
        remove_expert(artifact, "maths")


def test_the_fallback_cannot_be_removed(tmp_path: Path) -> None:
    data = gather(examples(COUNTS | {"law": 40}))
    trained = train_router(data, TrainingSettings(backend="tfidf", fallback="law"))
    with pytest.raises(RouterError, match="'law' is the router's fallback"):
        remove_expert(save(trained, tmp_path / "router"), "law")


def test_feedback_teaches_and_what_was_said_last_counts(tmp_path: Path) -> None:
    artifact = save(train_router(gather(examples(COUNTS)), TrainingSettings(backend="tfidf")), tmp_path / "router")
    router = artifact.router(None)
    said = [f"{text} over the fence" for text in sentences(None, 20, seed=8)]
    assert {router.route(text).expert for text in said} == {"base"}
    known = sentences("maths", 1)[0]
    feedback = [Example(said[0], None, "f:1"), *(Example(text, "maths", "f:2") for text in said)]
    feedback.append(Example(known, "code", "f:3"))
    before = len(artifact.store().labels)
    edit = learn(artifact, router.backend, feedback)
    assert edit.manifest.labels == ("code", "maths")
    written = write_router(
        tmp_path / "router", edit.manifest, edit.model, None, edit.store, known=edit.known, source=artifact, force=True
    )
    taught = written.router(None)
    assert sum(taught.route(text).expert == "maths" for text in said) >= 15
    assert taught.route(known).expert == "code"
    assert len(written.store().labels) == before + 20
    assert [item.field for item in written.known() if item.excerpt == known] == ["code"]
    assert written.manifest.split["learned 4"]["prompts"] == 21
    with pytest.raises(RouterError, match="unknown domain 'law'"):
        learn(written, router.backend, [Example("x", "law", "f:1")])
    with pytest.raises(RouterError, match="no prompt to learn from"):
        learn(written, router.backend, [])


def test_the_nearest_known_prompts_are_named(tmp_path: Path) -> None:
    artifact = save(train_router(gather(examples(COUNTS)), TrainingSettings(backend="tfidf")), tmp_path / "router")
    router, known = artifact.router(None), artifact.known()
    assert len(known) == len(router.model.gate.tensors()["gate.owners"])
    # Of the training part, whichever those are: the prompt itself is the nearest, and its expert owns it.
    own = next(item for item in known if item.field == "maths")
    found = router.explain(own.excerpt)
    assert found is not None and known[found.nearest[0].point] == own
    assert (found.nearest[0].owner, found.nearest[0].similarity) == ("maths", pytest.approx(1, abs=1e-2))
    assert found.distance < found.distance_threshold and found.confidence >= found.confidence_threshold
    foreign = router.explain("Which river is longer, the Nile or the Amazon?")
    assert foreign is not None and foreign.distance > foreign.distance_threshold
    nearest = foreign.nearest[0]
    assert nearest.owner is None and known[nearest.point].field == "geography and travel"
    assert router.explain(" ") is None
    (artifact.path / "known.json").write_text("[]")
    with pytest.raises(RouterError, match=r"known\.json"):
        RouterArtifact.open(artifact.path).known()


def test_no_beginning_of_a_prompt_is_kept_where_none_is_wanted(tmp_path: Path) -> None:
    settings = TrainingSettings(backend="tfidf", excerpts=False)
    artifact = save(train_router(gather(examples(COUNTS)), settings), tmp_path / "router")
    assert artifact.known() == () and not (artifact.path / "known.json").exists()
    texts = b"".join(path.read_bytes() for path in artifact.path.iterdir())
    assert sentences("maths", 1)[0].encode() not in texts
