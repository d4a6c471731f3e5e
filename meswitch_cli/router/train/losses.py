"""An expert's own loss on a response: what routing is for, and a label where nobody gave one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import RouterError, reason_of
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.texts import native_dtype, quiet_transformers
from meswitch_cli.router.train.data import Example
from meswitch_cli.token_batches import batches_by_length, padded

#: Prompts and responses longer than this are cut: the start of an answer tells its author.
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 512, 256


def expert_losses(
    experts: Mapping[str, Path], examples: Sequence[Example], base: str | None
) -> dict[str, torch.Tensor]:
    """Mean loss per response token, nats, of each expert on each example, `[n]` by name.

    Args:
        experts: name to an artifact (which needs the base) or to a checkpoint folder; loaded one at a time.

    Raises:
        RouterError: an example has no response, or an expert cannot be loaded.
    """
    for example in examples:
        if example.response is None:
            raise RouterError(f'{example.where}: needs a "response": experts are judged by their loss on it')
    losses = {}
    for name, path in experts.items():
        with _checkpoint(path, base) as folder:
            losses[name] = response_losses(folder, examples)
    return losses


@contextmanager
def _checkpoint(path: Path, base: str | None) -> Iterator[Path]:
    """The expert as an ordinary checkpoint; an artifact is restored for as long as it is needed."""
    if not (path / MANIFEST_FILE).is_file():
        yield path
        return
    if base is None:
        raise RouterError(f"{path}: an artifact needs its base to be loaded: give --base")
    with tempfile.TemporaryDirectory(prefix="meswitch-router-") as scratch:
        yield restore(Artifact.open(path), Checkpoint.open(base), Path(scratch) / "expert")


@torch.inference_mode()
def response_losses(folder: Path, examples: Sequence[Example]) -> torch.Tensor:
    """Mean loss per response token of one model, nats, `[n]`; prompts go through its own chat template."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder, RouterError)
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=native_dtype(), local_files_only=True, use_safetensors=True
            ).eval()
    except Exception as error:  # transformers raises many kinds for a checkpoint it cannot load
        raise RouterError(f"{folder}: the expert cannot be loaded: {reason_of(error)}") from error
    encoded = [_encode(tokenizer, example) for example in examples]
    result = torch.empty(len(examples))
    for batch in batches_by_length([len(ids) for ids, _ in encoded]):
        inputs, mask = padded([encoded[index][0] for index in batch])
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        for row, index in enumerate(batch):
            start, stop = encoded[index][1], int(mask[row].sum())
            logits = model.get_output_embeddings()(hidden[row, start - 1 : stop - 1]).float()
            result[index] = functional.cross_entropy(logits, inputs[row, start:stop])
    return result


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """(ids, start of the response)."""
    if getattr(tokenizer, "chat_template", None):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.text}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer.encode(rendered, add_special_tokens=False)
    else:
        prompt = tokenizer.encode(f"{example.text}\n")
    response = tokenizer.encode(example.response, add_special_tokens=False)
    prompt = prompt[-MAX_PROMPT_TOKENS:]
    return [*prompt, *response[:MAX_RESPONSE_TOKENS]], len(prompt)


def downstream(
    losses: Mapping[str, torch.Tensor], base_losses: torch.Tensor, truth: Sequence[str], routed: Sequence[str]
) -> dict[str, Any]:
    """Mean loss where each item's expert is chosen by the truth, by the router, at random, or is always the same.

    Args:
        losses: by expert, `[n]`; base_losses: of the base, which items that fell back are answered by.
        truth: the expert of each item's domain; routed: what the router chose, "base" where it fell back.
    """
    every = dict(losses) | {"base": base_losses}
    index = range(len(truth))
    single = {name: float(values.mean()) for name, values in losses.items()}
    best = min(single, key=lambda name: single[name])
    stacked = torch.stack(list(losses.values()))
    return {
        "items": len(truth),
        "loss": {
            "the lowest loss of all (oracle)": float(stacked.amin(0).mean()),
            "the domain's expert": float(torch.stack([losses[truth[item]][item] for item in index]).mean()),
            "this router": float(torch.stack([every[routed[item]][item] for item in index]).mean()),
            "chance (mean of the experts)": float(stacked.mean()),
            f"always {best} (best single expert)": single[best],
            "always the base": float(base_losses.mean()),
        },
    }
