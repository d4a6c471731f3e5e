"""The model of the proof: Mistral-7B's shape with few layers, its fine-tune, and artifacts of that under many names."""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpu.figures import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from meswitch_cli.engine import EngineSettings


@dataclass(frozen=True)
class Sizes:
    """How large the proof is.

    Attributes:
        layers: of the base; 32 would be a whole Mistral-7B.
        experts: in a mixed batch; `many` in that of the part of this name.
        prompt, new: tokens of a request; `long` those of a prompt that is timed for itself.
        steady: tokens of a request during which others are loaded.
        dense: full models side by side.
    """

    layers: int = 8
    vocabulary: int = 32000
    experts: int = 16
    many: int = 48
    requests: tuple[int, ...] = (1, 16, 64)
    prompt: int = 128
    long: int = 1024
    new: int = 64
    steady: int = 1900
    dense: int = 4
    max_model_len: int = 2048


FULL = Sizes()
TINY = Sizes(
    layers=2, vocabulary=300, experts=3, many=4, requests=(1, 3), prompt=12, long=40, new=6, steady=60, dense=2,
    max_model_len=128,
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Where everything lies, and how large it is."""

    scratch: Path
    tiny: bool

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def base(self) -> Path:
        return self.scratch / "model" / "base"

    @property
    def expert(self) -> Path:
        return self.scratch / "model" / "expert"

    def starting(self) -> AbstractContextManager[None]:
        """A block in which other parts may start too: most of it is compiling, which does not disturb them."""
        return self._lock("card", fcntl.LOCK_SH)

    def measuring(self) -> AbstractContextManager[None]:
        """A block that has the card to itself: it waits for the others' starts and measurements."""
        return self._lock("card", fcntl.LOCK_EX)

    @contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        with (self.scratch / f"{name}.lock").open("w") as file:
            fcntl.flock(file, kind)
            yield

    def write(self) -> None:
        """Write base and expert, unless they are there."""
        with self._lock("model", fcntl.LOCK_EX):
            self._write()

    def _write(self) -> None:
        if (self.expert / "tokenizer.json").exists():
            return
        started = time.perf_counter()
        if self.tiny:
            from zoo.tiny import make_pair

            make_pair(self.base.parent, vocab_size=self.sizes.vocabulary)
        else:
            from benchmarks.scale import write_pair

            write_pair(self.base.parent, self.sizes.layers)
        for folder in (self.base, self.expert):
            tokenizer(self.sizes.vocabulary).save_pretrained(folder)
        say("written", seconds=time.perf_counter() - started, gigabytes=2 * nbytes(self.base) / 1e9)

    def artifact(self, bits: str) -> Path:
        """The expert's artifact, made on the device unless it is there, and timed.

        Raises:
            SystemExit: it cannot be made.
        """
        folder = self.scratch / f"artifact-{bits}"
        if (folder / "meswitch.json").exists():
            return folder
        self.write()
        command = [
            sys.executable, "-m", "meswitch_cli", "compress", "--base", str(self.base), "--expert", str(self.expert),
            "--out", str(folder), "--bits", bits, "--device", self.device,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"meswitch compress --bits {bits}: exit {done.returncode}\n{done.stderr[-3000:]}")
        seconds, read = time.perf_counter() - started, nbytes(self.base)
        say(
            "compress",
            bits=bits,
            device=self.device,
            seconds=seconds,
            model_gb=read / 1e9,
            artifact_gb=nbytes(folder) / 1e9,
            model_gb_per_s=read / 1e9 / seconds,
        )
        return folder

    def experts(self, bits: str, count: int) -> dict[str, Path]:
        """The artifact under `count` names, each with a digest of its own: to the engine they are different experts.

        The shards are hard links, so that the disk holds them once.
        """
        with self._lock("experts", fcntl.LOCK_EX):
            return self._experts(bits, count)

    def _experts(self, bits: str, count: int) -> dict[str, Path]:
        artifact, found = self.artifact(bits), {}
        for index in range(count):
            name = f"e{index:02}"
            found[name] = self.scratch / f"experts-{bits}" / name
            if (found[name] / "meswitch.json").exists():
                continue
            found[name].mkdir(parents=True, exist_ok=True)
            for file in artifact.iterdir():
                if file.name != "meswitch.json" and not (found[name] / file.name).exists():
                    os.link(file, found[name] / file.name)
            manifest = json.loads((artifact / "meswitch.json").read_text())
            manifest["expert"]["id"] = name
            (found[name] / "meswitch.json").write_text(json.dumps(manifest, indent=1) + "\n")
        return found

    def settings(self, experts: dict[str, Path], base: Path | None = None, **others: object) -> EngineSettings:
        """Engine settings that differ between the parts in what they compare alone."""
        from meswitch_cli.engine import EngineSettings

        sizes = self.sizes
        running = max(*sizes.requests, sizes.many if len(experts) > sizes.experts else 1)
        tokens = running * (sizes.prompt + sizes.new + 64) + 4 * (sizes.steady + sizes.prompt)
        chosen = {
            "max_model_len": sizes.max_model_len,
            "max_running": running,
            "cache_tokens": tokens,
            "dtype": "bfloat16",
            **others,
        }
        return EngineSettings(base=str(base or self.base), experts=experts, **chosen)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a word for every id of the model, so that whatever it generates is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from zoo.tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS

    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"word{index}" for index in range(len(symbols), vocabulary)]
    made = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def nbytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def parser() -> argparse.ArgumentParser:
    """What every part that uses the model is told. One that is stopped says where it was."""
    faulthandler.register(signal.SIGTERM, chain=True)
    made = argparse.ArgumentParser()
    made.add_argument("--scratch", type=Path, required=True)
    made.add_argument("--tiny", action="store_true")
    return made
