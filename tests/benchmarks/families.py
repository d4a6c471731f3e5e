"""Which of transformers' families compress, restore and are served: writes docs/families.md.

    python tests bench families [--serving | --vllm PYTHON] [FAMILY ...]

A family is tried as a tiny model of its default configuration; `OVERRIDES` has what the defaults lack. Of families
named on the command line the page's rows are written anew, and the others stay as they are. With `--serving` what the
page says of compressing and restoring stays; without names, those are tried that are `not rerun`. With
`--vllm` the columns about vLLM are, by the Python of an environment that has it: of the families named, or of those
where they are empty.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from engine.family import greedy_tokens
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.skeleton import auto_class
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.engine import EngineSettings, TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, Engine, EngineError, GenerationRequest, Sampling
from meswitch_cli.engine.proof import prove, why_one_by_one
from meswitch_cli.engine.small import small_model
from meswitch_cli.errors import CalibrationError, MeswitchError, reason_of
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
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
MOST_SECONDS = 240
COLUMNS = "| family | compressed | restored | served | vLLM | why not in batches, or not at all | why not by vLLM |"
IN_BATCHES, ONE_BY_ONE, EQUAL = "in batches", "one by one", "equal"
#: Of a family that batches do not take, and that has not been tried one request at a time.
UNTRIED = "not rerun"
LENGTHS = (5, 13, 21, 34)
NEW_TOKENS = 8
RELATIVE_DELTA = 0.01


class Row(NamedTuple):
    """One family: what came out, or why nobody can tell.

    Attributes:
        served: by the embedded engine: `in batches` or `one by one` with tokens equal to transformers', or how not.
        vllm: as `served`, by the engine over vLLM; empty where that was not tried.
        reason: why it is not served in batches, or not at all.
        vllm_reason: why not by vLLM.
    """

    family: str
    compressed: str
    restored: str
    served: str
    vllm: str = ""
    reason: str = ""
    vllm_reason: str = ""


def try_family(family: str, folder: Path, before: Row | None = None) -> Row:
    """A family's row; what `before` says of compressing and restoring stays."""
    try:
        described = transformers.AutoConfig.for_model(family, **OVERRIDES.get(family, {}))
        config = json.loads(described.to_json_string(use_diff=False))
        _, plain = small_model(config, torch.float32)
    except MeswitchError as error:
        compressed = "no" if "cannot be compressed" in str(error) else "not tried"
        return Row(family, compressed, "", "refused", reason=plain_reason(error))
    except Exception as error:
        return Row(family, "not tried", "", "refused", reason=f"no default configuration: {reason_of(error)}")
    try:
        compressed, restored = (before.compressed, before.restored) if before else _compressed(plain, folder)
    except MeswitchError as error:
        return Row(family, "no", "", "refused", reason=plain_reason(error))
    try:
        why = why_one_by_one(config, "base", CPU, torch.float32)
        served = _served_alike(plain, folder / "served")
        return Row(family, compressed, restored, served, reason="" if why is None else plain_reason(EngineError(why)))
    except MeswitchError as error:
        return Row(family, compressed, restored, "refused", reason=plain_reason(error))


@torch.no_grad()
def made_up_expert(plain: Any, folder: Path) -> str:
    """Save a model as `folder/base`, make an expert of it up, and compress that to `folder/artifact`; return how."""
    generator = torch.Generator().manual_seed(2)
    before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    for name in ("base", "expert"):
        plain.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        for parameter in plain.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (RELATIVE_DELTA * parameter.norm() / noise.norm().clamp(min=1e-9))
    for name, parameter in plain.named_parameters():
        parameter.copy_(before[name])
    try:
        _compress(folder, RANDOM)
    except CalibrationError:
        _compress(folder, None, force=True)
        return "uncalibrated"
    return "yes"


@torch.no_grad()
def _compressed(plain: Any, folder: Path) -> tuple[str, str]:
    """How an expert made up for a model compresses, and whether it comes back as base + dequantised delta, bit for bit.

    transformers loads what is restored; what it loads is compared with the sums.
    """
    how = made_up_expert(plain, folder)
    artifact, base = Artifact.open(folder / "artifact"), CheckpointWeights(Checkpoint.open(str(folder / "base")))
    for _ in artifact.verify():
        pass
    restore(artifact, base.checkpoint, folder / "restored", dtype=torch.float32)
    loader = auto_class(artifact.config)
    loaded, told = loader.from_pretrained(folder / "restored", dtype=torch.float32, output_loading_info=True)
    if told["missing_keys"] or told["unexpected_keys"]:
        return how, "no, names differ"
    sums = build_model(ArtifactWeights(artifact, base), CPU, torch.float32).state_dict()
    differing = [name for name, value in loaded.state_dict().items() if not torch.equal(value, sums[name])]
    return how, f"no, {differing[0]}" if differing else "exact"


def _compress(folder: Path, calibration: str | None, *, force: bool = False) -> None:
    settings = CompressionSettings.with_defaults(calibration=calibration, salient=4)
    job = prepare(str(folder / "base"), str(folder / "expert"), folder / "artifact", settings, None)
    compress(job, force=force, keep_weak=True)


@torch.no_grad()
def _served_alike(plain: Any, folder: Path) -> str:
    """Whether the engine on a saved model gives what `generate` gives: alone, and four requests at once."""
    plain.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    checkpoint = Checkpoint.open(str(folder))
    loaded = auto_class(checkpoint.config).from_pretrained(checkpoint.source.path).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple((8 + torch.randint(70, (length,), generator=generator)).tolist()) for length in LENGTHS]
    sampling = Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [GenerationRequest(f"{index}", BASE, prompt, sampling) for index, prompt in enumerate(prompts)]
    expected = [greedy_tokens(loaded, request) for request in requests]
    engine = TransformersEngine(
        EngineSettings(base=str(folder), dtype="float32", max_model_len=64, cache_tokens=512, page_size=8)
    )
    if differing := differing_ways(engine, requests, expected):
        return f"not equal, {differing}"
    return IN_BATCHES if engine.one_by_one is None else ONE_BY_ONE


def differing_ways(engine: Engine, requests: Sequence[GenerationRequest], expected: Sequence[tuple[int, ...]]) -> str:
    """In which ways of asking an engine, which is started and stopped here, its tokens are others; empty for none."""
    try:
        engine.start()
        alone = [generate(engine, [request])[0].tokens for request in requests]
        together = [completion.tokens for completion in generate(engine, requests)]
    finally:
        engine.stop()
    return ", ".join(name for name, found in (("alone", alone), ("in a batch", together)) if found != expected)


def plain_reason(error: Exception) -> str:
    """A message without what comes before the reason."""
    message = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", str(error))
    for word in ("base: ", "config.json: ", "artifact: ", "does not serve "):
        message = message.partition(word)[2] or message
    message = message.partition(": ")[2] if re.match(r"[\w-]+: ", message) else message
    return re.split(r"\. (?=[A-Z])|; compress it without", message.removesuffix(":"))[0].strip(":. ")


def _rows_of_page() -> dict[str, Row]:
    """What the page says already; nothing of a page with other columns."""
    text = PAGE.read_text()
    found = re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", text, re.MULTILINE) if COLUMNS in text else []
    cells = {family: re.split(r" \| ?", rest) for family, rest in found}
    return {family: Row(family, *rest) for family, rest in cells.items() if len(rest) == len(Row._fields) - 1}


def _page(rows: list[Row], known: int, machine: str) -> str:
    compressed, served = Counter(row.compressed for row in rows), Counter(row.served for row in rows)
    lines = [
        INTRO.read_text().format(version=transformers.__version__),
        "| families | |",
        "|---|---|",
        f"| known to transformers | {known} |",
        f"| tried | {len(rows) - compressed['not tried']} |",
        f"| compressed and verified | {compressed['yes'] + compressed['uncalibrated']} |",
        f"| of these, without calibration alone | {compressed['uncalibrated']} |",
        f"| of these, restored exactly | {sum(row.restored == 'exact' for row in rows)} |",
        f"| served by the embedded engine, tokens equal | {served[IN_BATCHES] + served[ONE_BY_ONE]} |",
        f"| of these, in batches | {served[IN_BATCHES]} |",
        f"| of these, one request at a time | {served[ONE_BY_ONE]} |",
        f"| served by the engine over vLLM, tokens equal | {sum(row.vllm == 'equal' for row in rows)} |\n",
        COLUMNS,
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (f"`{row.family}`", *(_cell(text) for text in row[1:]))
        lines.append(f"| {' | '.join(cells)} |")
    if len(rows) < known:
        lines.append(f"\n{known - len(rows)} families have not been run since the columns changed.")
    if served[UNTRIED]:
        lines.append(
            f"\n{served[UNTRIED]} families that batches do not take have not been tried one request at a time."
        )
    lines.append(f"\nBy `python tests bench families`, last on {machine}.")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """One line of a table: the first sentence of what may be many."""
    line = " ".join(text.split()).replace("|", "\\|")
    line = line.removeprefix("1 validation error for ModelConfig Value error, ")
    return line.partition(". Should contain one of")[0].partition(" [type=")[0]


@contextmanager
def given_up_after(seconds: int, timer: int = signal.ITIMER_PROF) -> Iterator[None]:
    """Seconds of this process's own computing, whatever else the machine does; of a clock with `ITIMER_REAL`."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not decided within {seconds} s")

    sent = signal.SIGPROF if timer == signal.ITIMER_PROF else signal.SIGALRM
    signal.signal(sent, give_up)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)


def _row(family: str, before: Row | None) -> Row:
    try:
        with tempfile.TemporaryDirectory() as folder, given_up_after(MOST_SECONDS):
            return try_family(family, Path(folder), before)
    except Exception as error:
        return Row(family, "not tried", "", "refused", reason=f"{type(error).__name__}: {reason_of(error)}")


def _over_vllm(python: str, families: Sequence[str]) -> Iterator[Row]:
    """What vLLM does with families, one after the other in a process of its own, and another where that ends."""
    left = list(families)
    while left:
        command = [python, str(Path(__file__).parents[1]), "bench", "families_vllm", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"family"'):
                    found = json.loads(line)
                    left.remove(found["family"])
                    yield Row(found["family"], "", "", "", found["served"], vllm_reason=found["reason"])
        if left and process.returncode:
            yield Row(left.pop(0), "", "", "", "not tried", vllm_reason=f"the process ended with {process.returncode}")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    python, named = (sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--vllm"] else (None, sys.argv[1:])
    serving = named[:1] == ["--serving"]
    named = named[1:] if serving else named
    if python is None:  # compiles the kernels
        prove(transformers.AutoConfig.for_model("llama").to_dict(), "llama", CPU, torch.float32)
    machine, started = describe(), time.perf_counter()
    every = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
    compressed = {name: row for name, row in _rows_of_page().items() if row.compressed == "yes"}
    unserved = [name for name, row in compressed.items() if row.served == UNTRIED]
    untried = [name for name, row in compressed.items() if not row.vllm]
    chosen = named or (untried if python else unserved if serving else every)
    attempts = (_row(name, compressed.get(name) if serving else None) for name in chosen)
    for found in _over_vllm(python, chosen) if python else attempts:
        family = found.family
        rows = _rows_of_page()  # as another run may have left it meanwhile
        old = rows.get(family, Row(family, "", "", ""))
        kept, new = (old, found) if python else (found, old)
        rows[family] = kept._replace(vllm=new.vllm, vllm_reason=new.vllm_reason)
        print(f"{time.perf_counter() - started:6.1f} s  {' | '.join(found)}", file=sys.stderr, flush=True)
        shown = [rows[name] for name in every if name in rows]
        PAGE.write_text(_page(shown, len(every), machine))


if __name__ == "__main__":
    main()
