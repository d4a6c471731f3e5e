from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.errors import CheckpointError, RouterError
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.base import BaseHiddenStates
from zoo.tiny import make_pair


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt_neox"])
def test_pooled_states_are_the_mean_of_transformers_own(family: str, tmp_path: Path) -> None:
    """At every layer, for prompts of unlike lengths in one batch, as each has them alone in the whole model."""
    base = make_pair(tmp_path, family, num_hidden_layers=3, dtype=torch.float32)[0]
    prompts = [[5, 9, 200, 31], [7], [11, 12, 13, 14, 15, 16, 17]]
    states = BaseHiddenStates(str(base), 2, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in (1, 2):
        found = states.pooled_hidden_states(prompts, layer)
        assert found.shape == (3, 96) and found.dtype == torch.float32
        for row, ids in enumerate(prompts):
            with torch.inference_mode():
                hidden = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
            assert torch.allclose(found[row], hidden[0].mean(0), rtol=1e-4, atol=1e-4)
    both = states.pooled_at(prompts, (1, 2))
    assert torch.equal(both[2], states.pooled_hidden_states(prompts, 2))


def test_threads_do_not_hear_each_other(base: Path) -> None:
    states = BaseHiddenStates(str(base), 2)
    prompts = [[[number + 5, number + 6]] * 3 for number in range(8)]
    alone = [states.pooled_hidden_states(ids, 2) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda ids: states.pooled_hidden_states(ids, 2), prompts))
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(together, alone, strict=True))


def test_layers_above_the_probe_are_not_read(tmp_path: Path) -> None:
    base = make_pair(tmp_path, num_hidden_layers=3, dtype=torch.float32)[0]
    before = BaseHiddenStates(str(base), 1, dtype=torch.float32).pooled_hidden_states([[1, 2, 3]], 1)
    file = base / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    kept = {name: value for name, value in tensors.items() if "embed" in name or ".layers.0." in name or "norm" in name}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
    after = BaseHiddenStates(str(base), 1, dtype=torch.float32)
    assert torch.equal(after.pooled_hidden_states([[1, 2, 3]], 1), before)
    assert sum(1 for name, _ in after._model.named_modules() if name.endswith("mlp")) == 1


def test_impossible_layers_and_empty_prompts_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="has 4 decoder layers, layer 5 is asked for"):
        BaseHiddenStates(str(base), 5)
    states = BaseHiddenStates(str(base), 2)
    with pytest.raises(RouterError, match="layers 1 to 2 are loaded"):
        states.pooled_hidden_states([[1]], 3)
    with pytest.raises(RouterError, match="without tokens"):
        states.pooled_hidden_states([[1], []], 1)
    with pytest.raises(CheckpointError, match="no such folder"):
        BaseHiddenStates(str(tmp_path / "nothing"), 1)
    with pytest.raises(RouterError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, RouterError)
