"""What `--size` weighs errors by, beside the KL that they make on the same tokens: rows for docs/results/trellis.md.

    python tests bench cost [--group quick] [--expert maths] [--items 6]

Scalar signs in every linear, with unbiased steps, no directions and no salient channels; everything else is the
expert's own, in fp32. The last column has errors of the same size whose signs are drawn anew: they are independent.
"""

from __future__ import annotations

import argparse

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import describe
from benchmarks.sparse import WEIGHTS, Tensors, is_linear, texts_of
from benchmarks.zeros_kl import rounded
from meswitch_cli.calibration.data import random_window
from meswitch_cli.calibration.sensitivity import drawn_windows, stream_sensitivities
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.model.weights import CheckpointWeights
from zoo.cache import Zoo, folder_at

WINDOWS = 4
#: Of the errors' own length: a cost that is right is so at any.
LENGTHS = (1.0, 0.3, 0.1)
Predictions = list[torch.Tensor]


def divergence(reference: Predictions, other: Predictions) -> float:
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, other, strict=True)]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", default="quick")
    parser.add_argument("--expert", default="maths")
    parser.add_argument("--items", type=int, default=6)
    options = parser.parse_args()
    zoo = Zoo(folder_at(options.group), (options.expert,))
    folder = zoo.experts[options.expert]
    base, expert = (safetensors.torch.load_file(path / WEIGHTS) for path in (zoo.base, folder))
    weights = CheckpointWeights(Checkpoint.open(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32).eval()
    code = rounded(1, "scalar")
    errors: Tensors = {}
    for name, weight in expert.items():
        if is_linear(name, weight):
            delta = weight.float() - base[name].float()
            errors[name] = delta - code(delta)

    @torch.no_grad()
    def predictions(tensors: Tensors, windows: torch.Tensor) -> Predictions:
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        return [torch.log_softmax(model(window[None]).logits[0].double(), -1) for window in windows]

    def with_errors(length: float, generator: torch.Generator | None = None) -> Tensors:
        result = dict(expert)
        for name, error in errors.items():
            own = length * error
            if generator is not None:
                own = own * (2.0 * torch.randint(2, error.shape, generator=generator) - 1)
            result[name] = expert[name].float() - own
        return result

    random = torch.stack([random_window(base["model.embed_tokens.weight"].shape[0], i)[0] for i in range(WINDOWS)])
    texts = texts_of(zoo, options.expert, options.items)
    shortest = min(text.shape[1] for text in texts)
    asked = {
        "drawn": drawn_windows(weights, random, seed=0, device="cpu", dtype=torch.float32),
        "random": random,
        "items": torch.cat([text[:, :shortest] for text in texts]),
    }
    print(f"{options.expert} of {options.group}, {describe()}\n")
    print("| tokens | windows | entropy, nats | errors' length | cost, nats | KL | KL with signs drawn anew |")
    print("|---|---|---|---|---|---|---|")
    for label, windows in asked.items():
        cost = sum(
            float((found[name].of_rows(slice(None)) * errors[name].square()).sum(dtype=torch.float64))
            for _, found in stream_sensitivities(weights, windows)
            for name in found.keys() & errors.keys()
        )
        full = predictions(expert, windows)
        entropy = float(torch.cat([-(p.exp() * p).sum(-1) for p in full]).mean())
        for length in LENGTHS:
            own = divergence(full, predictions(with_errors(length), windows))
            anew = divergence(full, predictions(with_errors(length, torch.Generator().manual_seed(1)), windows))
            print(
                f"| {label} | {windows.shape[0]} x {windows.shape[1]} | {entropy:.1f} | {length} | "
                f"{cost * length**2:.2e} | {own:.2e} | {anew:.2e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
