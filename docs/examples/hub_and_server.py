# %% [markdown]
# # Publish, fetch, serve
# An artifact goes to the Hugging Face Hub, and a server takes it from there. Publishing needs a token: `hf auth login`.
# Run it as `python hub_and_server.py BASE ARTIFACT OWNER/NAME`.

# %%
import json
import sys
import urllib.request

import meswitch_cli as meswitch

BASE, ARTIFACT, REPO = sys.argv[1:] or ("./base", "./maths-1bit", "ann/llama-maths-1bit")

# %% [markdown]
# ## Publish
# Every byte is checked first. A new repository is private unless `public=True`. The card tells the fine-tune's licence
# where its own card does.

# %%
published = meswitch.push(ARTIFACT, REPO)
print(f"{published.url} has {published.nbytes / 1e6:.2f} MB")
for note in published.notes:
    print(f"note: {note}")

# %% [markdown]
# ## Fetch
# `owner/name@commit` always means these bytes.

# %%
artifact = meswitch.pull(published.name)
assert artifact.digest == meswitch.open_artifact(ARTIFACT).digest

# %% [markdown]
# ## Serve
# A Hub id does wherever an artifact is named. The server speaks OpenAI's API; port 0 takes a free one.

# %%
with meswitch.serve(BASE, {"maths": REPO}, port=0, max_model_len=256) as server:
    body = {"model": "maths", "prompt": "What is 12 times 12?", "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{server.address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
print(f"{answer['model']}: {answer['choices'][0]['text']!r}")
