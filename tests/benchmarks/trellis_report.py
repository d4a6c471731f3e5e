"""What benchmarks.trellis measured as a Markdown page."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.codes import TRELLIS_CODES
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import expected_entry
from meswitch_cli.engine.memory import plan_memory
from meswitch_cli.estimates import wilson_interval

INTRO = Path(__file__).parent / "trellis_intro.md"
#: Mistral-7B's linears, how many of each shape, and its vocabulary's tensors.
LINEARS = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
VOCABULARY = (32000, 4096)
LINEARS_7B = sum(rows * columns * count for (rows, columns), count in LINEARS.items())
#: Its bytes in bf16, norms included; a router by the base's own hidden states takes some kilobytes.
FULL_7B = 2 * (LINEARS_7B + 2 * math.prod(VOCABULARY) + 65 * 4096)
ROUTER = 10**6
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SCALAR_1, SCALAR_2 = ("1 bit, scalar", 1, "scalar"), ("2 bits, scalar", 2, "scalar")


def write_page(data: Path, page: Path) -> None:
    """Write the page from the JSON files of a results folder."""
    parts = [INTRO.read_text()]
    if (data / "codes.json").exists():
        parts.append(_codes(json.loads((data / "codes.json").read_text())))
    for file in sorted(data.glob("*.json")):
        if file.stem not in ("codes", "zeros"):
            parts.append(_expert(file.stem, json.loads(file.read_text())))
    for name, (title, text) in SETS.items():
        found = {file.stem: json.loads(file.read_text()) for file in sorted((data / name).glob("*.json"))}
        if found:
            parts.append(_set(title, text, found))
    if (data / "zeros.json").exists():
        parts.append(_zeros(json.loads((data / "zeros.json").read_text())))
    page.write_text("\n".join([*parts, _sizes(), _served()]))


SETS = {
    "embedding": (
        "Embedding",
        "Linears at 0.25 bit with the defaults; embedding and head, one tensor, by what its codes store for a weight: "
        "2 is scalar, the others trellis codes.",
    ),
    "size": ("A size", "`--size`: settings chosen tensor by tensor for so many bytes."),
}


def _set(title: str, text: str, experts: dict[str, Any]) -> str:
    lines = [
        f"## {title}\n",
        f"{text} KL in percent of the base's to the full expert.\n",
        "| expert | row | MB | of these embedding and vectors | KL, % | linears alone | compressing, CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, value in experts.items():
        base = value["ends"]["base_kl"]
        for row, found in value["rows"].items():
            others = found["nbytes"] - found["linear_nbytes"]
            lines.append(
                f"| {name} | {row} | {found['nbytes'] / 1e6:.2f} | {others / 1e6:.2f} "
                f"| {100 * found['kl'] / base:.3g} | {100 * found['linear_kl'] / base:.3g} "
                f"| {found.get('cpu_seconds', math.nan):.0f} |".replace("nan", "")
            )
    items = ", ".join(
        f"{name} {value['ends']['kl_items']} ({value['ends']['tokens']} answer tokens)"
        for name, value in experts.items()
    )
    machines = dict.fromkeys(row["machine"] for value in experts.values() for row in value["rows"].values())
    return "\n".join([*lines, f"\nReport items: {items}. On {'; '.join(machines)}.\n"])


def _zeros(value: dict[str, Any]) -> str:
    lines = [
        "## Zeros\n",
        "Noise of unbiased codes of rows of the experts' linears, over the rows' energy. *Ternary* is −1, 0 or 1 times "
        "a step a row, stored in 1.6 bits (five in a byte); its entropy is the least that it could be stored in. *Dead "
        "zone* has four levels at 2 bits, one of them zero. Beside the ternary code stands what trellis codes have at "
        "as many bits, read off between 1 bit and 2 scalar ones.\n",
        "| expert | zeros, % | 1 bit, trellis | 1 bit, scalar | ternary, 1.6 bits | trellis, 1.6 bits | entropy, bits "
        "| trellis there | dead zone, 2 bits | scalar, 2 bits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in value["experts"].items():
        names = ("trellis 1", "scalar 1", "ternary", "trellis at packed ternary")
        first = " | ".join(f"{found[key]:.3f}" for key in names)
        lines.append(
            f"| {name} | {100 * found['zeros']:.0f} | {first} | {found['entropy']:.2f} "
            f"| {found['trellis at entropy']:.3f} | {found['dead zone']:.3f} | {found['scalar 2']:.3f} |"
        )
    return "\n".join([*lines, f"\n`python tests bench zeros`, on {value['machine']}.\n"])


def _served() -> str:
    """What Mistral-7B and experts of it take on a card of 80 GB, as `meswitch plan` says."""
    lines = [
        "`meswitch plan` for 80 GB: the base, as many slots as experts, or as fit, and what is left for the cache of "
        "requests of 4,096 tokens.\n",
        "| `--bits` | a slot, GB | at most | 16 experts: requests | 48 experts | 128 experts |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MISTRAL))
        base = Checkpoint.describe(folder)
        for name, options in (("0.25", {"bits": 0.25}), ("1", {"bits": 1}), ("2", {"bits": 2})):
            settings = CompressionSettings.with_defaults(**options).by_kind()
            plans = [
                plan_memory(base, settings, device_nbytes=80 * 10**9, experts=count, messages=True)
                for count in (16, 48, 128)
            ]
            told = " | ".join(
                f"{plan.requests:,}" if plan.requests else f"{plan.most_slots} in slots, the others wait"
                for plan in plans
            )
            lines.append(f"| {name} | {plans[0].slot_nbytes / 1e9:.3f} | {plans[0].most_slots} | {told} |")
    return "\n".join([*lines, ""])


def _sizes() -> str:
    """Bytes of an expert of Mistral-7B's shape whose tensors all differ, on disk and in a slot, computed."""
    lines = [
        "## Mistral-7B's shape\n",
        "Bytes of an expert whose tensors all differ from the base's, computed from the shapes: 8 salient channels, "
        "rank 16, embedding and head beside 16 directions of their own at ¼ bit at least, 1 bit at most. *In a "
        "slot* are the codes of the linears on a CPU, which decodes them once (a GPU holds them as they are), *whole* "
        "what all of it takes on disk; the full expert has 14.48 GB. *Three experts*: how many times smaller than "
        "three full models one base, three such experts and a router of a megabyte are "
        "(1.74 in the paper).\n",
        "| linears | codes, GB | in a slot, GB | steps, channels, directions, GB | embedding, head, GB | whole, GB "
        "| three experts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, bits, code in (
        *((f"{bits} bit, trellis", bits, "trellis") for bits in TRELLIS_CODES),
        SCALAR_1,
        SCALAR_2,
    ):
        codes = beside = slot = 0
        for (rows, columns), count in LINEARS.items():
            entry = expected_entry(QuantizerSettings(bits, 8, rank=16, code=code), (rows, columns))
            own = 4 * rows * entry.code_words
            codes += count * own
            beside += count * (entry.expected_nbytes(2) - own)
            slot += count * rows * columns * entry.width // 8
        of_ends = CompressionSettings.with_defaults(bits=bits, code=code)
        ends = expected_entry(of_ends.embedding(), VOCABULARY).expected_nbytes(2)
        ends += expected_entry(of_ends.head(), VOCABULARY).expected_nbytes(2)
        whole = codes + beside + ends
        sizes = " | ".join(f"{size / 1e9:.3f}" for size in (codes, slot, beside, ends, whole))
        ratio = 3 * FULL_7B / (FULL_7B + 3 * whole + ROUTER)
        lines.append(f"| {name} | {sizes} | {ratio:.2f} |")
    return "\n".join([*lines, ""])


def _codes(value: dict[str, Any]) -> str:
    lines = [
        "## Codes\n",
        "Noise of unbiased steps over the energy of the rows, 4,096 wide; the bound is that of any code of as many "
        "bits on a Gaussian, 1 / (2^(2 bits) − 1).\n",
        "| code | Gaussian | bound | Laplacian |",
        "|---|---|---|---|",
    ]
    for name, bits, on_gaussian, on_laplacian in value["noise"]:
        lines.append(f"| {name} | {on_gaussian:.4g} | {1 / (4.0**bits - 1):.4g} | {on_laplacian:.4g} |")
    lines += [
        "\nProcessor time of `quantize` with 8 salient channels on one thread, the least of three, and the same times "
        f"the {LINEARS_7B / 1e9:.2f} billion weights of Mistral-7B's linears, computed, on two cores.\n",
        "| code | s a million weights | with rank 16 | 7B with rank 16, minutes |",
        "|---|---|---|---|",
    ]
    for name, plain, ranked in value["seconds"]:
        lines.append(f"| {name} | {plain * 1e6:.4f} | {ranked * 1e6:.4f} | {ranked * LINEARS_7B / 2 / 60:.1f} |")
    lines.append(f"\nOn {value['machine']}.\n")
    return "\n".join(lines)


def _expert(name: str, value: dict[str, Any]) -> str:
    ends, measured = value["ends"], value["rows"]
    items = ends["items"]
    base = f"the base answers {ends['base_right']} rightly, " if "base_right" in ends else ""
    low, high = wilson_interval(ends["expert_right"], items)
    lines = [
        f"## {name}\n",
        f"{items} report items, {ends['tokens']} answer tokens of {ends['kl_items']} of them for KL. KL of the base to "
        "the full expert "
        f"{ends['base_kl']:.4f} nats a token; {base}the full expert answers "
        f"{ends['expert_right']} "
        f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %). KL in percent of the base's; *linears alone* has the "
        "expert's own embedding.\n",
        "| linears | MB | of these linears | bits a linear's weight | weight noise | KL, % | linears alone "
        "| same answers | right | compressing, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, found in measured.items():
        answers = f"{found['same']} | {found['right']}" if "same" in found else "|"
        lines.append(
            f"| {row} | {found['nbytes'] / 1e6:.2f} | {found['linear_nbytes'] / 1e6:.2f} "
            f"| {8 * found['linear_nbytes'] / found['linear_weights']:.2f} | {found['noise']:.3f} "
            f"| {100 * found['kl'] / ends['base_kl']:.3g} | {100 * found['linear_kl'] / ends['base_kl']:.3g} "
            f"| {answers} | {found['cpu_seconds']:.0f} |"
        )
    machines = list(dict.fromkeys(found["machine"] for found in measured.values()))
    lines.append("\nOn " + "; ".join(machines) + ".\n")
    return "\n".join(lines)
