# %% [markdown]
# # Many experts, one base
# One engine holds the base once and the experts' deltas beside it; prompts for any of them go in one batch.
# Run it as `python many_experts.py BASE NAME=ARTIFACT NAME=ARTIFACT ...`; artifacts are folders or Hub ids.

# %%
import sys

import meswitch_cli as meswitch

BASE, *named = sys.argv[1:] or ("./base", "maths=./experts/maths", "code=./experts/code")
EXPERTS = dict(pair.split("=", 1) for pair in named)

# %% [markdown]
# ## Start
# Every artifact is checked, and the base is proven to be theirs. Two slots: two experts on the device at once, however
# many there are.

# %%
engine = meswitch.Engine(BASE, EXPERTS, slots=min(2, len(EXPERTS)), max_model_len=256)
for name, status in engine.experts().items():
    print(f"{name}: {status.nbytes / 1e6:.2f} MB, on the {status.residency}")

# %% [markdown]
# ## One batch
# The same prompt, continued by the base and by every expert at once.

# %%
names = ["base", *EXPERTS]
answers = engine.generate(["What is 12 times 12?"] * len(names), expert=names, max_tokens=16, temperature=0)
for name, answer in zip(names, answers, strict=True):
    print(f"{name}: {answer.text!r}")

# %% [markdown]
# ## A conversation, as it comes
# The expert's own chat template renders the messages.

# %%
for piece in engine.stream("Write a haiku about apples.", expert=names[-1], max_tokens=24, temperature=0.7, seed=1):
    print(piece, end="", flush=True)
print()

# %% [markdown]
# ## Others while it runs

# %%
last = names[-1]
engine.unload_expert(last)
engine.load_expert(f"{last}-again", EXPERTS[last])
print(sorted(engine.experts()))
engine.stop()
