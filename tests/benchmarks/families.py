"""Which of transformers' families compress and are served: writes docs/families.md.

    python tests bench families [FAMILY ...]

A family is tried as a tiny model of its default configuration; `OVERRIDES` has what the defaults lack. Families named
on the command line are shown and not written.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.machine import describe
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine import EngineSettings, TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling
from meswitch_cli.engine.proof import prove
from meswitch_cli.engine.small import small_model
from meswitch_cli.errors import MeswitchError, reason_of
from zoo.tiny_tokenizer import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
INTRO = Path(__file__).with_name("families_intro.md")
CPU = torch.device("cpu")
#: What the default configurations of some families lack, or have in sizes that no small model can do without.
OVERRIDES: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "num_attention_heads": 32},
}
#: A family that takes longer is given up.
MOST_SECONDS = 120
LENGTHS = (5, 13, 21, 34)
NEW_TOKENS = 8


class Row(NamedTuple):
    """One family. `compresses` and `served` are yes, no, or why nobody can tell."""

    family: str
    compresses: str
    served: str
    equal: str
    reason: str


def try_family(family: str, folder: Path) -> Row:
    try:
        described = transformers.AutoConfig.for_model(family, **OVERRIDES.get(family, {}))
        config = json.loads(described.to_json_string(use_diff=False))
        _, plain = small_model(config, torch.float32)
    except MeswitchError as error:
        compresses = "no" if "cannot be compressed" in str(error) else "not tried"
        return Row(family, compresses, "refused", "", _plain(error))
    except Exception as error:
        return Row(family, "not tried", "refused", "", f"no default configuration: {reason_of(error)}")
    try:
        prove(config, "base", CPU, torch.float32)
    except MeswitchError as error:
        return Row(family, "yes", "refused", "", _plain(error))
    try:
        return Row(family, "yes", "yes", _served_alike(plain, folder), "")
    except MeswitchError as error:
        return Row(family, "yes", "refused", "", _plain(error))


@torch.no_grad()
def _served_alike(plain: Any, folder: Path) -> str:
    """Whether the engine on a saved model gives what `generate` gives: alone, and four requests at once."""
    plain.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(Checkpoint.open(str(folder)).source.path).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple((8 + torch.randint(70, (length,), generator=generator)).tolist()) for length in LENGTHS]
    expected = [
        tuple(
            loaded.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
        )
        for prompt in prompts
    ]
    sampling = Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [GenerationRequest(f"{index}", BASE, prompt, sampling) for index, prompt in enumerate(prompts)]
    engine = TransformersEngine(
        EngineSettings(base=str(folder), dtype="float32", max_model_len=64, cache_tokens=512, page_size=8)
    )
    try:
        engine.start()
        alone = [generate(engine, [request])[0].tokens for request in requests]
        together = [completion.tokens for completion in generate(engine, requests)]
    finally:
        engine.stop()
    differing = [name for name, found in (("alone", alone), ("in a batch", together)) if found != expected]
    return "no, " + ", ".join(differing) if differing else "equal"


def _plain(error: Exception) -> str:
    """A message without what comes before the reason."""
    message = str(error)
    message = message.replace(tempfile.gettempdir(), "")
    for word in ("base: ", "config.json: ", "does not serve "):
        message = message.partition(word)[2] or message
    message = message.partition(": ")[2] if re.match(r"[\w-]+: ", message) else message
    return re.split(r"; meswitch handles|\. (?=[A-Z])", message.removesuffix(":"))[0].strip(":. ")


def _page(rows: list[Row], seconds: float, machine: str) -> str:
    counts = Counter(
        "served, equal" if row.equal == "equal" else "served, not equal" if row.served == "yes" else "refused"
        for row in rows
    )
    lines = [
        INTRO.read_text().format(version=transformers.__version__),
        f"{len(rows)} families: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}; "
        f"{sum(row.compresses == 'yes' for row in rows)} compress.\n",
        "| family | compresses | served | greedy tokens | why not |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (f"`{row.family}`", *row[1:-1], row.reason.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\n{seconds:.0f} s by `python tests bench families`: {machine}.")
    return "\n".join(lines) + "\n"


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"not decided within {MOST_SECONDS} s")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _give_up)
    machine, started, rows = describe(), time.perf_counter(), []
    for family in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(MOST_SECONDS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(try_family(family, Path(folder)))
        except Exception as error:
            rows.append(Row(family, "not tried", "refused", "", f"{type(error).__name__}: {reason_of(error)}"))
        finally:
            signal.alarm(0)
        print(f"{time.perf_counter() - started:6.1f} s  {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
        if not sys.argv[1:]:
            PAGE.write_text(_page(rows, time.perf_counter() - started, machine))


if __name__ == "__main__":
    main()
