"""Which config entries make two models compute differently."""

from typing import Any

import pytest

from meswitch_cli.checkpoint.config import config_differences

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_what_does_not_matter_is_left_out() -> None:
    base = {"model_type": "llama", "rope_theta": 1e4, "vocab_size": 10, "torch_dtype": "float32"}
    found = config_differences(base, base | {"rope_theta": 1e6, "vocab_size": 12, "torch_dtype": "bfloat16"})
    assert {key: [side["rope_theta"] for side in sides] for key, sides in found.items()} == {
        "rope_parameters": [1e4, 1e6]
    }


def test_another_spelling_is_the_same() -> None:
    old = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000.0, "max_position_embeddings": 4096}
    assert config_differences(PLAIN, old) == {}
    assert list(config_differences(PLAIN, old | {"rope_theta": 5e5})) == ["rope_parameters"]


def test_a_default_that_is_written_out_is_the_same() -> None:
    assert config_differences(PLAIN, PLAIN | {"rms_norm_eps": 1e-6, "hidden_act": "silu"}) == {}
    assert config_differences(PLAIN, PLAIN | {"hidden_act": "gelu"}) == {"hidden_act": ("silu", "gelu")}


@pytest.mark.parametrize("entry", [{"auto_map": {"AutoConfig": "x.Y"}}, {"_name_or_path": "/home/me"}], ids=str)
def test_code_and_paths_are_not_looked_at(entry: dict[str, Any]) -> None:
    assert config_differences(PLAIN, PLAIN | entry) == {}
