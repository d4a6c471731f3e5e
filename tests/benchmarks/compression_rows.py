"""Which methods are measured on which fine-tunes, and what a page calls them."""

from __future__ import annotations

BASE, EXPERT = "base", "full expert"
#: The artifact of `meswitch compress` without options; of a fine-tune that has none here it is the first of `DEFAULTS`.
BY_ITSELF = "compress"
#: Fine-tunes that are not stored in the default code by themselves (docs/results/sparse.md).
OTHER_FORMS = ("lora16", "lora64", "reinforced")
OURS = "steps=output-unbiased,activations=random"
ONE = f"meswitch:bits=1,salient=8,channel_scale=rms,{OURS}"
TRELLIS = f"meswitch:code=trellis,salient=8,{OURS}"
#: What `meswitch compress` does by itself at 1, 2 and 4 bits, as methods.
DEFAULTS = {
    f"{ONE},rank=16": "`--bits 1`",
    f"meswitch:bits=2,salient=8,{OURS},rank=16,factor_bits=8": "`--bits 2`",
    f"meswitch:bits=4,salient=8,{OURS},rank=16,factor_bits=8,embedding=4": "`--bits 4`",
}
#: What it does by itself with a merged LoRA, and the same in narrower factors.
PRODUCTS = {
    f"meswitch:bits=0,rank={rank},factor_bits={bits}": f"`--bits 0 --rank {rank}{told}`"
    for rank in (16, 64)
    for bits, told in ((8, ""), (4, " --factor-bits 4"))
}
#: Other methods that are an option or two of `meswitch compress`.
OPTIONS = {
    f"{TRELLIS},bits=0.125,rank=16,embedding=1": "`--bits 0.125`",
    f"{TRELLIS},bits=0.25,rank=16,embedding=1": "`--bits 0.25`",
    f"{TRELLIS},bits=0.5,rank=16,embedding=1": "`--bits 0.5`",
    f"{TRELLIS},bits=0.125,rank=16": "`--bits 0.125 --embedding-bits 2`",
    f"{TRELLIS},bits=0.25,rank=16": "`--bits 0.25 --embedding-bits 2`",
    f"{TRELLIS},bits=0.25,rank=16,channel_scale=rms": "`--bits 0.25 --embedding-bits 2 --channel-scale rms`",
    f"{TRELLIS},bits=0.5,rank=16": "`--bits 0.5 --embedding-bits 2`",
    f"{TRELLIS},bits=1,rank=16": "`--bits 1 --code trellis --embedding-bits 2`",
    f"{ONE},rank=64": "`--bits 1 --rank 64`",
    f"{ONE},rank=0": "`--bits 1 --rank 0`",
    f"meswitch:bits=1,salient=0,channel_scale=rms,{OURS},rank=16,embedding=1": (
        "`--bits 1 --salient 0 --embedding-bits 1`"
    ),
    f"meswitch:bits=2,salient=8,{OURS},rank=16": "`--bits 2 --factor-bits 4`",
    f"meswitch:bits=2,salient=8,{OURS}": "`--bits 2 --rank 0`",
    f"meswitch:bits=4,salient=8,{OURS},embedding=4": "`--bits 4 --rank 0`",
}
#: Fixed before any was measured; those that need data last, so that a run without it has the rest.
ROWS = (
    BASE,
    EXPERT,
    BY_ITSELF,
    *DEFAULTS,
    *PRODUCTS,
    *OPTIONS,
    "bitdelta:embedding=2",
    "bitdelta:masks=2",
    "per-axis:axis=best",
    "rtn:bits=2,group=128",
    "low-rank:bits=2",
    "d-qrelo",
    "d-qrelo:order=svd-first",
    "delta-come:bits=0.9,embedding=1",
    "delta-come:bits=1.2",
    "delta-come:bits=1.85",
    "dare",
    "dare:choice=magnitude,rescale=projection",
    "d-qrelo:rounding=gptq",
    "delta-come:bits=0.9,embedding=1,rounding=gptq",
    "delta-come:bits=1.2,rounding=gptq",
    "delta-come:bits=1.85,rounding=gptq",
)
#: What is measured of the other kinds of fine-tune.
KIND_ROWS = (
    BASE,
    EXPERT,
    BY_ITSELF,
    *DEFAULTS,
    f"{TRELLIS},bits=0.25,rank=16,embedding=1",
    f"{TRELLIS},bits=0.25,rank=16",
    "bitdelta:embedding=2",
    "bitdelta:masks=2",
    "rtn:bits=2,group=128",
    "low-rank:bits=2",
    "d-qrelo",
    "delta-come:bits=0.9,embedding=1",
    "delta-come:bits=1.2",
)
#: And of the larger base, on which a row takes ten minutes of a core.
CODER_ROWS = (
    BASE,
    EXPERT,
    f"{ONE},rank=16",
    f"meswitch:bits=2,salient=8,{OURS}",
    f"{TRELLIS},bits=0.25,rank=16,embedding=1",
    "bitdelta:embedding=2",
    "rtn:bits=2,group=128",
    "d-qrelo",
    "delta-come:bits=1.2",
)
#: What an overview shows of each group, and by which name.
OVERVIEW = {
    BY_ITSELF: "`compress`, no options",
    next(iter(DEFAULTS)): "`--bits 1`",
    list(DEFAULTS)[1]: "`--bits 2`",
    f"{TRELLIS},bits=0.25,rank=16": "`--bits 0.25 --embedding-bits 2`",
    f"{TRELLIS},bits=0.25,rank=16,embedding=1": "`--bits 0.25`",
    "delta-come:bits=1.2": "Delta-CoMe, 1.2 bits",
    "delta-come:bits=1.2,rounding=gptq": "..., calibrated",
    "delta-come:bits=0.9,embedding=1": "Delta-CoMe, 0.9 bits",
    "delta-come:bits=0.9,embedding=1,rounding=gptq": "..., calibrated",
    "low-rank:bits=2": "low rank",
    "rtn:bits=2,group=128": "2 bits in groups",
    "d-qrelo": "D-QRELO",
    "bitdelta:masks=2": "BitDelta, 2 masks",
    "bitdelta:embedding=2": "BitDelta",
}
ROWS_OF = {"strong": ROWS, "kinds": KIND_ROWS, "coder": CODER_ROWS}


def label(row: str) -> str:
    """What a page calls a row: the options of `meswitch compress`, or the method of `meswitch eval --baseline`."""
    if row == BY_ITSELF:
        return OVERVIEW[row]
    return DEFAULTS.get(row) or PRODUCTS.get(row) or OPTIONS.get(row) or row
