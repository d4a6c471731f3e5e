"""The encoder and the letter model on tiny random models, and counted words."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from meswitch_cli.errors import RouterError, UsageError
from meswitch_cli.router import open_router
from meswitch_cli.router.backends.encoder import Encoder
from meswitch_cli.router.backends.lm import LetterModel
from meswitch_cli.router.backends.tfidf import Tfidf
from meswitch_cli.router.store.artifact import RouterArtifact
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.editing import add_expert
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import train_router

from .conftest import COUNTS, WORDS, examples, save, sentences


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer whose vocabulary is the tests' words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for members in WORDS.values() for word in members if word.isalpha()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *map(str, range(10))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_encoder_pools_over_tokens_without_padding(encoder_folder: Path) -> None:
    encoder = Encoder(encoder_folder, max_tokens=256)
    assert encoder.max_tokens == 48
    texts = ["sum product", "function python loop variable compile string", " ".join(["sum"] * 300)]
    together, alone = encoder.features(texts), torch.cat([encoder.features([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    with pytest.raises(RouterError, match="not an encoder's folder"):
        Encoder(encoder_folder / "nothing", max_tokens=64)


def test_an_encoder_router_carries_its_encoder(encoder_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in encoder_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    trained = train_router(gather(examples(COUNTS)), TrainingSettings(backend="encoder"), model=copy)
    artifact = save(trained, tmp_path / "router")
    for path in copy.iterdir():
        path.unlink()
    router = open_router(tmp_path / "router")
    assert sum(router.route(text).expert == "maths" for text in sentences("maths", 20, seed=1)) >= 16
    assert artifact.nbytes > (artifact.path / "model" / "model.safetensors").stat().st_size
    (artifact.path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RouterError, match=r"model\.safetensors: 0 bytes"):
        open_router(tmp_path / "router")
    with pytest.raises(UsageError, match="--model DIR is needed"):
        train_router(gather(examples(COUNTS)), TrainingSettings(backend="encoder"))


def test_tfidf_by_hand() -> None:
    texts = ["alpha beta", "alpha gamma"]
    backend = Tfidf.of(texts, max_tokens=64)
    first, second = backend.features(texts).numpy()
    common, rare = np.log(3 / 3) + 1, np.log(3 / 2) + 1
    # Two words and the pair of them; alpha is in both texts.
    expected = common**2 / (common**2 + 2 * rare**2)
    assert first @ second == pytest.approx(expected, rel=1e-5)
    assert np.linalg.norm(first) == pytest.approx(1)
    assert not backend.features([""]).any()


@pytest.fixture(scope="module")
def lm_router(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RouterArtifact, list[float]]:
    settings = TrainingSettings(backend="lm", lm_steps=40, lm_learning_rate=1e-3, max_tokens=32, target_precision=0.5)
    data = gather(examples({"maths": 80, "code": 80}, seed=1))
    trained = train_router(data, settings, model=base)
    notes = trained.manifest.training
    return save(trained, tmp_path_factory.mktemp("lm") / "router"), [*notes["first_losses"], *notes["last_losses"]]


def test_letters_are_learned(lm_router: tuple[RouterArtifact, list[float]]) -> None:
    """The loss is on one token of 268: it begins at about log 268 and must come down to the letters."""
    losses = lm_router[1]
    assert sum(losses[:5]) / 5 > 3 and sum(losses[-5:]) / 5 < 1.2


def test_scores_are_the_letters_logits(lm_router: tuple[RouterArtifact, list[float]]) -> None:
    """What the router's head computes is what the saved language model itself says of the letters."""
    from transformers import AutoModelForCausalLM

    artifact = lm_router[0]
    router = open_router(artifact.path)
    backend = router.backend
    assert isinstance(backend, LetterModel) and backend.options == ("code", "maths")
    text = sentences("maths", 1, seed=3)[0]
    question = backend.question(text, backend.options)
    asked = backend.tokenizer.decode(question)
    assert asked.startswith(text[:16]) and asked.endswith("A. code\nB. maths\nAnswer:")
    whole = AutoModelForCausalLM.from_pretrained(artifact.path / "model", dtype=backend.model.dtype)
    with torch.inference_mode():
        logits = whole(torch.tensor([question])).logits[0, -1, backend.letter_ids].float()
    assert torch.allclose(router.model.scores(backend.features([text]))[0], logits, atol=0.15)
    long = backend.question("word " * 1000, backend.options)
    assert len(long) == 32 + len(question) - len(backend.tokenizer.encode(text)[:32])


def test_an_lm_router_is_trained_anew_for_other_experts(lm_router: tuple[RouterArtifact, list[float]]) -> None:
    artifact = lm_router[0]
    backend = open_router(artifact.path).backend
    with pytest.raises(RouterError, match="must be trained anew"):
        add_expert(artifact, backend, "law", examples({"law": 30}))
    tensors = safetensors.torch.load_file(artifact.path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_too_many_options_are_refused(base: Path) -> None:
    with pytest.raises(RouterError, match="between 2 to 26 experts, not 27"):
        LetterModel(base, tuple(f"expert{index}" for index in range(27)), max_tokens=16)


def test_settings_are_checked() -> None:
    for wrong in ({"target_precision": 1.0}, {"max_tokens": 4}, {"sticky_margin": 2.0}):
        with pytest.raises(UsageError, match="--"):
            TrainingSettings(**wrong)
    with pytest.raises(RouterError, match="fallback 'law'"):
        train_router(gather(examples(COUNTS)), TrainingSettings(backend="tfidf", fallback="law"))
    with pytest.raises(UsageError, match="--base is needed"):
        train_router(gather(examples(COUNTS)), TrainingSettings())
    with pytest.raises(RouterError, match="expert 'law' is given, but no prompt"):
        train_router(gather(examples(COUNTS)), TrainingSettings(backend="tfidf"), experts={"law": None})
    mislabelled = [Example(item.text, item.domain, item.where) for item in examples(COUNTS)]
    half = [item for item in mislabelled if item.domain == "maths"]
    noise = [Example(item.text, "code" if index % 2 else "maths", "") for index, item in enumerate(half)]
    with pytest.raises(RouterError, match="no threshold reaches a precision"):
        train_router(gather(noise), TrainingSettings(backend="tfidf", target_precision=0.99))
