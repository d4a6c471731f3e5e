"""Generation by the base and its experts: `TransformersEngine`, `EngineSettings`, `generate`."""

from meswitch_cli.engine.generate import Completion, generate
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.transformers_engine import TransformersEngine

__all__ = ["Completion", "EngineSettings", "TransformersEngine", "generate"]
