"""`make demo`: the whole of it on real weights, with the commands that a user would type.

A small real model is fine-tuned on word problems and on code (cached outside the repository). Both fine-tunes are
compressed; one is proven, restored, and the restored model compared with the fine-tune on problems that neither has
seen. A router learns their prompts, and a server answers for both and the base.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import zoo
from meswitch_cli.evaluation.fidelity import EncodedItem
from zoo.compare import compare, reference_logits
from zoo.item import read_items

EXPERTS = ("maths", "code")
COMPARED = "maths"
ITEMS = 30
ROUTER_PROMPTS = 120
OUT = Path("build/demo")
PROGRAM = Path(sys.executable).parent / "meswitch"
#: A question that no expert was made for.
OTHER_QUESTION = "Who wrote Pride and Prejudice?"
#: How long the server may take to load, and an answer to come.
PATIENCE = 300


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def show(*arguments: object) -> list[str]:
    """Print a command as a user types it, and give it as this environment runs it."""
    words = list(map(str, arguments))
    say(f"$ {shlex.join(['meswitch', *words])}")
    return [str(PROGRAM), *words]


def run(*arguments: object) -> None:
    """Show a command and run it; what it says beside its result comes with it, in order."""
    subprocess.run(show(*arguments), check=True, stderr=subprocess.STDOUT)


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    """Show `meswitch serve`, and give the address of the server while it runs."""
    command = show("serve", *arguments)
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = ""
        for line in process.stderr:
            print(line, end="", flush=True)
            if line.startswith("page "):
                address = line.split()[1].rstrip("/")
            if line.startswith("  "):  # the example's last line
                break
        if not address:
            raise SystemExit("the server did not start")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


def compare_restored(base: Path, expert: Path, report: Path) -> str:
    """Losses and distances of base, fine-tune and restored model on held-out problems, and what they come to."""
    tokenizer = AutoTokenizer.from_pretrained(expert)
    encoded = [zoo.encode_item(tokenizer, item) for item in read_items(report)[:ITEMS]]
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
    return (
        f"{100 * recovered:.2f} % of what the fine-tune learned is there; "
        f"{100 * divergences['restored'] / divergences['base']:.3f} % of the base's divergence is left "
        f"({ITEMS} problems)"
    )


def prompts_of(file: Path, target: Path) -> Path:
    """The prompts of a domain's training items, as `train-router` takes them."""
    lines = [json.dumps({"prompt": item["prompt"]}) for item in read_items(file)[:ROUTER_PROMPTS]]
    target.write_text("\n".join(lines) + "\n")
    return target


def main() -> None:
    started = time.perf_counter()
    logging.disable_progress_bar()  # bars of libraries smear into each other; the commands have their own
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    say("A base and two fine-tunes of it: made now if this is the first time, about a minute each.")
    family = zoo.build(quick=True, experts=EXPERTS)
    base, artifacts = family.base, {name: OUT / "experts" / name for name in EXPERTS}
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for name, out in artifacts.items():
        run("compress", "--base", base, "--expert", family.experts[name], "--out", out)
    run("inspect", artifacts[COMPARED], "--plot", OUT / f"{COMPARED}.png")
    run("list", OUT / "experts", "--verify")
    run("restore", artifacts[COMPARED], "--base", base, "--out", OUT / "restored", "--dtype", "float32")
    say("The restored model beside the fine-tune, on problems that neither has seen:")
    print(compare_restored(base, family.experts[COMPARED], family.items_file(COMPARED, "report")))

    files = {name: prompts_of(family.items_file(name, "train"), OUT / f"{name}.jsonl") for name in EXPERTS}
    taught = [word for name, file in files.items() for word in ("--expert", f"{name}={file}")]
    known = [word for name, out in artifacts.items() for word in ("--artifact", f"{name}={out}")]
    router = OUT / "router"
    run("train-router", "--base", base, *taught, *known, "--out", router)
    questions = [read_items(family.items_file(name, "report"))[0]["prompt"] for name in EXPERTS]
    run("route", "--router", router, "--base", base, questions[0])
    with serving("--base", base, "--experts-dir", OUT / "experts", "--router", router) as address:
        for question in (*questions, OTHER_QUESTION):
            run("chat", "--url", address, "--temperature", 0, "--max-tokens", 48, "--prompt", question)
    served = f"--base {base} --experts-dir {OUT / 'experts'} --router {router}"
    say(
        f"All of it in {time.perf_counter() - started:.0f} s. What to try next:\n"
        f"  the chat page, and OpenAI's API  meswitch serve {served}\n"
        "  your own models                  meswitch compress --base BASE --expert FINE-TUNE --out EXPERT\n"
        "  how good that is                 meswitch eval --base BASE --expert FINE-TUNE --artifact EXPERT "
        "--text HELD-OUT.jsonl --out REPORT"
    )


if __name__ == "__main__":
    main()
