"""Which class is built of a config, and the buffers that no weight gives."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from meswitch_cli.checkpoint.config import parsed_config
from meswitch_cli.checkpoint.skeleton import auto_class, materialise_buffers, skeleton

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


def _config(family: str, **entries: Any) -> dict[str, Any]:
    """As transformers writes config.json."""
    config: dict[str, Any] = json.loads(AutoConfig.for_model(family, **entries).to_json_string(use_diff=False))
    return config


@pytest.mark.parametrize(
    ("family", "named", "built"),
    [
        ("llama", [], "LlamaForCausalLM"),
        ("mistral3", [], "Mistral3ForConditionalGeneration"),
        ("qwen3_5", [], "Qwen3_5ForCausalLM"),
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5_text", ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
    ],
)
def test_a_model_that_sees_is_built_where_the_config_names_it_or_there_is_no_other(
    family: str, named: list[str], built: str
) -> None:
    config = _config(family) | {"architectures": named}
    assert auto_class(config).__name__ in ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    assert type(skeleton(config, "here")).__name__ == built


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them() -> None:
    config = _config("falcon_h1", **SIZES)
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert list(parsed_config(config).time_step_limit) == [0.0, float("inf")]


def test_buffers_that_a_class_computes_when_it_is_made_are_computed() -> None:
    config = _config("falcon_h1", **SIZES) | {"ssm_multipliers": [2.0, 3.0, 5.0, 7.0, 11.0]}
    model: Any = skeleton(config, "here")
    materialise_buffers(model, config, torch.device("cpu"), "here")
    assert model.model.layers[0].mamba.mup_vector.unique().tolist() == [2.0, 3.0, 5.0, 7.0, 11.0]
