"""Some of transformers' families over vLLM: prints, a line of JSON each, whether tokens are plain transformers'.

    python tests bench families_vllm FAMILY ...

`python tests bench families --vllm PYTHON` runs it, and again with the rest where a family ends the process.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from engine.family import greedy_tokens
from engine.vllm.processes import fork_engines

from benchmarks.families import (
    CPU,
    EQUAL,
    LENGTHS,
    MOST_SECONDS,
    NEW_TOKENS,
    OVERRIDES,
    differing_ways,
    given_up_after,
    made_up_expert,
    plain_reason,
)
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.skeleton import auto_class
from meswitch_cli.engine import EngineSettings
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling
from meswitch_cli.engine.small import Config, random_model, small_config
from meswitch_cli.engine.vllm.engine import VllmEngine
from meswitch_cli.errors import MeswitchError, reason_of
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights

#: The narrowest heads that vLLM's attention on a CPU takes.
HEAD_DIM = 32
PAGE_SIZE = 32
EXPERT = "expert"


def _with_wide_heads(config: Config) -> Config:
    """A small config whose heads vLLM takes."""
    inner = config.get("text_config", config)
    width = inner.get("head_dim") or inner["hidden_size"] // inner["num_attention_heads"]
    if isinstance(inner.get("head_dim"), int):
        inner["head_dim"] = max(width, HEAD_DIM)
    if inner["hidden_size"] == inner["num_attention_heads"] * width and width < HEAD_DIM:
        fewer = max(1, inner["num_attention_heads"] * width // HEAD_DIM)
        inner["num_attention_heads"] = fewer
        if isinstance(inner.get("num_key_value_heads"), int):
            inner["num_key_value_heads"] = min(inner["num_key_value_heads"], fewer)
    return config


def serve(family: str, folder: Path) -> str:
    """`equal`, or what differs. Raises MeswitchError where it is refused."""
    described = transformers.AutoConfig.for_model(family, **OVERRIDES.get(family, {}))
    config = _with_wide_heads(small_config(json.loads(described.to_json_string(use_diff=False))))
    with torch.no_grad():
        made_up_expert(random_model(config, torch.float32), folder)
    base, artifact = Checkpoint.open(str(folder / "base")), Artifact.open(folder / "artifact")
    plain = auto_class(base.config).from_pretrained(folder / "base", dtype=torch.float32).eval()
    expert = build_model(ArtifactWeights(artifact, CheckpointWeights(base)), CPU, torch.float32)
    for model in (plain, expert):  # which knows every soft cap
        model.set_attn_implementation("eager")
    sampling = Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    generator = torch.Generator().manual_seed(1)
    requests = [
        GenerationRequest(
            f"{index}",
            (BASE, EXPERT)[index % 2],
            tuple((8 + torch.randint(70, (length,), generator=generator)).tolist()),
            sampling,
        )
        for index, length in enumerate(LENGTHS)
    ]
    expected = [greedy_tokens(expert if item.expert == EXPERT else plain, item) for item in requests]
    settings = EngineSettings(
        base=str(folder / "base"),
        experts={EXPERT: folder / "artifact"},
        dtype="float32",
        max_model_len=64,
        cache_tokens=2048,
        page_size=PAGE_SIZE,
        strict=True,
    )
    differing = differing_ways(VllmEngine(settings), requests, expected)
    return f"not equal, {differing}" if differing else EQUAL


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    fork_engines()
    for family in sys.argv[1:]:
        try:
            with tempfile.TemporaryDirectory() as folder, given_up_after(MOST_SECONDS, signal.ITIMER_REAL):
                served, reason = serve(family, Path(folder)), ""
        except MeswitchError as error:
            served, reason = "refused", plain_reason(error)
        except Exception as error:  # what no small model of can be made, or vLLM cannot run
            served, reason = "not tried", f"{type(error).__name__}: {reason_of(error)}"
        print(json.dumps({"family": family, "served": served, "reason": reason}), flush=True)


if __name__ == "__main__":
    main()
