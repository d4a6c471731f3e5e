# %% [markdown]
# # A fine-tune as a delta, and back
# Compress a fine-tune against its base, look at what it costs, and load it as a transformers model.
# Run it as a script, `python compress_and_load.py BASE FINE_TUNE OUT`, or cell by cell in an editor that knows `# %%`.

# %%
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import meswitch_cli as meswitch

BASE, EXPERT, OUT = sys.argv[1:] or ("./base", "./maths", "./maths-1bit")

# %% [markdown]
# ## Compress
# One decoder layer is in memory at a time. A call that was interrupted goes on where it stopped.

# %%
artifact = meswitch.compress(BASE, EXPERT, OUT, bits=1, force=True)
manifest = artifact.manifest
print(f"{manifest.expert.id} against {manifest.base.id}: {manifest.nbytes / 1e6:.2f} MB in {len(manifest.shards)} file")

# %% [markdown]
# ## Load
# Base + delta, as a plain model. `restore` writes the same to disk.

# %%
model = meswitch.load(BASE, artifact)
tokenizer = AutoTokenizer.from_pretrained(artifact.path)

# %% [markdown]
# transformers loads the artifact by itself too, since `meswitch_cli` has been imported.

# %%
same = AutoModelForCausalLM.from_pretrained(artifact.path, meswitch_base=BASE)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.to(model.device).parameters(), strict=True))

# %% [markdown]
# ## How near is it?
# KL divergence of the next token, in nats, from the full fine-tune to the delta, and to the base.


# %%
@torch.inference_mode()
def log_probabilities(network: torch.nn.Module, text: str) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids.to(network.device)
    return torch.log_softmax(network(ids).logits[0].float(), dim=-1).cpu()


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.exp() * (first - second)).sum(-1).mean())


TEXT = "Tom has 17 apples and buys 25 more. How many are there? There are 42."
full = log_probabilities(AutoModelForCausalLM.from_pretrained(EXPERT), TEXT)
base = log_probabilities(AutoModelForCausalLM.from_pretrained(BASE), TEXT)
compressed = log_probabilities(model, TEXT)
print(f"KL from the fine-tune: delta {divergence(full, compressed):.4f}, base {divergence(full, base):.4f}")
