"""`make demo`: the main job on real weights, with the commands that a user would type.

A small real model is fine-tuned on word problems (cached outside the repository), compressed, proven, restored, and
the restored model compared with the fine-tune on problems that neither has seen.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from meswitch_cli.evaluation.fidelity import EncodedItem
from zoo.compare import compare, reference_logits
from zoo.item import read_items

EXPERT = "maths"
ITEMS = 30
OUT = Path("build/demo")


def run(*arguments: object) -> None:
    """Show a command and run it."""
    command = ["meswitch", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / "meswitch"), *command[1:]], check=True)


def main() -> None:
    started = time.perf_counter()
    family = zoo.build(quick=True, experts=[EXPERT])
    base, expert = family.base, family.experts[EXPERT]
    shutil.rmtree(OUT, ignore_errors=True)
    run("compress", "--base", base, "--expert", expert, "--out", OUT / "maths-1bit")
    run("inspect", OUT / "maths-1bit", "--plot", OUT / "maths-1bit.png")
    run("verify", OUT / "maths-1bit", "--base", base)
    run("restore", OUT / "maths-1bit", "--base", base, "--out", OUT / "restored", "--dtype", "float32")
    print("\nThe restored model beside the fine-tune, on problems that neither has seen:")
    tokenizer = AutoTokenizer.from_pretrained(expert)
    encoded = [zoo.encode_item(tokenizer, item) for item in read_items(family.items_file(EXPERT, "report"))[:ITEMS]]
    items = [EncodedItem(tuple(tokens), start) for tokens, start in encoded]
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in {"base": base, "fine-tune": expert, "restored": OUT / "restored"}.items()
    }
    reference = reference_logits(models["fine-tune"], items)
    losses, divergences = {}, {}
    for name, model in models.items():
        figures = compare(reference, model, items)
        losses[name], divergences[name], agreed = (
            float(torch.cat([item[quantity] for item in figures]).mean()) for quantity in ("loss", "kl", "agreed")
        )
        print(
            f"{name:>10}: loss {losses[name]:.4f} nats a token, KL to the fine-tune {divergences[name]:.5f}, "
            f"same first token {100 * agreed:.1f} %"
        )
    recovered = (losses["base"] - losses["restored"]) / (losses["base"] - losses["fine-tune"])
    print(
        f"{100 * recovered:.2f} % of what the fine-tune learned is there; "
        f"{100 * divergences['restored'] / divergences['base']:.3f} % of the base's divergence is left "
        f"({ITEMS} problems, {time.perf_counter() - started:.0f} s in all)"
    )


if __name__ == "__main__":
    main()
