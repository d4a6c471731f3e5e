"""The small configurations that are proven in place of large ones."""

from __future__ import annotations

import pytest
from engine.proving import LARGE, check

from meswitch_cli.engine.small import VOCABULARY, as_wide, narrowed, small_config, special_ids, with_short_mlps

pytestmark = pytest.mark.usefixtures("nothing_proven_before")


def test_small_configs_keep_what_a_family_is() -> None:
    first, *others = (small_config(LARGE, narrow) for narrow in (narrowed, with_short_mlps, as_wide))
    assert (first["num_attention_heads"], first["num_key_value_heads"], first["head_dim"]) == (4, 2, 16)
    assert (first["hidden_size"], first["intermediate_size"], first["num_hidden_layers"]) == (64, 96, 2)
    assert first["vocab_size"] == VOCABULARY and max(special_ids(first)) < VOCABULARY
    assert len(special_ids(first)) == 4
    assert [item["hidden_size"] for item in others] == [8192, 8192]
    assert [item["intermediate_size"] for item in others] == [96, 28672]


def test_small_configs_keep_every_kind_of_layer() -> None:
    first = small_config({"model_type": "gemma3_text", "num_hidden_layers": 26})
    assert first["layer_types"] == ["sliding_attention", "full_attention"]
    smollm = small_config({"model_type": "smollm3", "num_hidden_layers": 36, "no_rope_layer_interval": 4})
    assert smollm["no_rope_layers"] == [1, 0] and smollm["num_hidden_layers"] == 2


def test_small_configs_narrow_the_ropes_lists() -> None:
    factors = [1.0] * 48
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    config = {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rope_parameters": rope,
    }
    first = small_config(config)
    assert len(first["rope_parameters"]["short_factor"]) == 8
    check(config)
