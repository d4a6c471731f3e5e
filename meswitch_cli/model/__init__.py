"""A transformers model out of any weights: what is under everything that runs one."""

from meswitch_cli.model.build import build_model
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.model.weights import CheckpointWeights, Weights

__all__ = ["CheckpointWeights", "Weights", "build_model", "load_tokenizer"]
