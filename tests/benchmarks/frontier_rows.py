"""The rows of benchmarks.frontier, fixed before any was measured: `--baseline`s of `meswitch eval`, and artifacts."""

from __future__ import annotations

from typing import Any

BASE = "base"
EXPERT = "full expert"

#: Rows that are artifacts of `meswitch compress`, with its settings: training steps is not a `--baseline`.
ARTIFACTS: dict[str, dict[str, Any]] = {
    "meswitch compress --bits 1 --steps distill": {
        "bits": 1,
        "channel_scale": "rms",
        "steps": "distill",
        "calibrated": True,
    },
    "meswitch compress --bits 2 --steps distill": {"bits": 2, "steps": "distill", "calibrated": True},
}

#: By nominal size; what a row really takes is measured and shown.
FRONTIER = {
    "about 1 bit a weight": (
        "bitdelta:embedding=1",
        "per-axis:axis=row,embedding=1",
        "per-axis:axis=column,embedding=1",
        "per-axis:axis=best,embedding=1",
        "low-rank:bits=1,embedding=1",
        "delta-come:bits=0.9,embedding=1",
        "rtn:bits=1,embedding=1",
        "meswitch:bits=1,salient=0,steps=least-squares,embedding=1",
        "meswitch:bits=1,salient=0,embedding=1",
        "meswitch:bits=1,salient=0,channel_scale=rms,embedding=1",
        "meswitch:bits=1,salient=0,channel_scale=rms,steps=output-unbiased,activations=random,embedding=1",
        "meswitch:bits=1,salient=0,channel_scale=rms,steps=output-unbiased,activations=random,rank=4,embedding=1",
        "meswitch:bits=1,salient=0,channel_scale=rms,steps=output-unbiased,activations=random,rank=16,embedding=1",
    ),
    "about 1.5 bits": (
        "bitdelta:embedding=2",
        "bitdelta:embedding=2,distill=40",
        "low-rank:bits=1.35",
        "delta-come:bits=1.2",
        "meswitch:bits=1,salient=8,activations=none",
        "meswitch:bits=1,salient=8",
        "meswitch:bits=1,salient=8,channel_scale=rms,activations=none",
        "meswitch:bits=1,salient=8,channel_scale=rms",
        "meswitch:bits=1,salient=8,steps=layerwise",
        "meswitch:bits=1,salient=8,channel_scale=rms,steps=output-unbiased,activations=random",
        "meswitch:bits=1,salient=8,channel_scale=rms,steps=output-unbiased",
        "meswitch compress --bits 1 --steps distill",
        "meswitch:bits=1,salient=0,channel_scale=rms,steps=output-unbiased,activations=random,rank=16",
        "meswitch:bits=1,salient=8,channel_scale=rms,steps=output-unbiased,activations=random,rank=16",
        "meswitch:bits=1,salient=8,channel_scale=rms,steps=output-unbiased,rank=16",
    ),
    "about 2 bits": (
        "bitdelta:masks=2",
        "bitdelta:masks=2,distill=40",
        "rtn:bits=2",
        "rtn:bits=2,group=128",
        "low-rank:bits=2",
        "delta-come:bits=1.85",
        "sparse:bits=2",
        "meswitch:bits=2,salient=0,steps=least-squares",
        "meswitch:bits=2,salient=0",
        "meswitch:bits=2,salient=8,steps=least-squares",
        "meswitch:bits=2,salient=8,activations=none",
        "meswitch:bits=2,salient=8",
        "meswitch:bits=2,salient=8,steps=layerwise",
        "meswitch:bits=2,salient=8,steps=output-unbiased,activations=random",
        "meswitch:bits=2,salient=8,steps=output-unbiased",
        "meswitch:bits=2,salient=0,group=64",
        "meswitch compress --bits 2 --steps distill",
        "meswitch:bits=1,salient=8,channel_scale=rms,steps=output-unbiased,activations=random,rank=64",
        "meswitch:bits=2,salient=0,steps=output-unbiased,activations=random,rank=16",
        "meswitch:bits=2,salient=8,steps=output-unbiased,activations=random,rank=16",
        "meswitch:bits=2,salient=8,steps=output-unbiased,rank=16",
    ),
    "about 4 bits": (
        "bitdelta:masks=4,embedding=4",
        "rtn:bits=4,embedding=4",
        "rtn:bits=4,group=128,embedding=4",
        "low-rank:bits=4,embedding=4",
        "delta-come:bits=3.6,embedding=4",
        "sparse:bits=6,embedding=4",
        "meswitch:bits=4,salient=0,embedding=4",
        "meswitch:bits=4,salient=8,embedding=4",
        "meswitch:bits=4,salient=8,activations=none,embedding=4",
        "meswitch:bits=2,salient=8,steps=output-unbiased,activations=random,rank=16,embedding=4",
        "meswitch:bits=4,salient=0,steps=output-unbiased,activations=random,rank=16,embedding=4",
    ),
    "as its authors store it": ("bitdelta:embedding=16",),
}

#: Which eight channels: at equal bytes by construction. A channel scale costs about as much as one salient channel.
ABLATION = {
    f"{bits} {'bit' if bits == 1 else 'bits'}": tuple(
        f"meswitch:bits={bits},salient={salient}{rest}"
        for salient, rest in (
            (8, ""),
            (8, ",activations=random"),
            (8, ",activations=none"),
            (8, ",saliency=activation"),
            (8, ",saliency=magnitude"),
            (8, ",saliency=random"),
            (1, ""),
            (0, ",channel_scale=rms"),
            (0, ""),
        )
    )
    for bits in (1, 2)
}

SWEEP_SALIENT = (0, 1, 2, 4, 8, 16, 32, 64)
SWEEP = {bits: tuple(f"meswitch:bits={bits},salient={salient}" for salient in SWEEP_SALIENT) for bits in (1, 2)}

SWEEP_RANK = (0, 1, 2, 4, 8, 16, 32, 64)
#: How many directions, and how they compare with salient channels of the same bytes (8 channels, 16 directions).
RANKS = {
    bits: tuple(
        f"meswitch:bits={bits},salient=0,{scale}steps=output-unbiased,activations=random"
        + (f",rank={rank}" if rank else "")
        for rank in SWEEP_RANK
    )
    for bits, scale in ((1, "channel_scale=rms,"), (2, ""))
}


#: Measured first: every method once at every size where it is at home, and which channels stay.
FIRST = (
    BASE,
    EXPERT,
    "bitdelta:embedding=1",
    "per-axis:axis=best,embedding=1",
    "delta-come:bits=0.9,embedding=1",
    "meswitch:bits=1,salient=0,channel_scale=rms,embedding=1",
    "bitdelta:embedding=2",
    "delta-come:bits=1.2",
    "meswitch:bits=1,salient=8,channel_scale=rms",
    "bitdelta:masks=2",
    "rtn:bits=2,group=128",
    "low-rank:bits=2",
    "delta-come:bits=1.85",
    "sparse:bits=2",
    "meswitch:bits=2,salient=0",
    "meswitch:bits=2,salient=8,steps=least-squares",
    "meswitch:bits=2,salient=8",
    "meswitch:bits=2,salient=8,steps=layerwise",
    "rtn:bits=4,group=128,embedding=4",
    "delta-come:bits=3.6,embedding=4",
    "meswitch:bits=4,salient=8,embedding=4",
    *ABLATION["2 bits"],
    *SWEEP[2],
    *ABLATION["1 bit"],
)


def rows() -> list[str]:
    """Every row once, in the order of measuring."""
    groups = (FIRST, *FRONTIER.values(), SWEEP[1], *RANKS.values())
    return list(dict.fromkeys(spec for group in groups for spec in group))
