"""Which methods are measured on which fine-tunes, and what a page calls them."""

from __future__ import annotations

BASE, EXPERT = "base", "full expert"
#: The artifact of `meswitch compress` without options.
BY_ITSELF = "compress"
#: Artifacts of so many bytes: a third of what Delta-CoMe takes of an expert of either base.
BY_SIZE = {"compress:size=8100000": "`--size 8.1MB`", "compress:size=19000000": "`--size 19MB`"}
OURS = "steps=output-unbiased,activations=random"
ONE = f"meswitch:bits=1,salient=8,channel_scale=rms,{OURS}"
TRELLIS = f"meswitch:code=trellis,salient=8,{OURS}"
#: Directions of embedding and head, as `meswitch compress` keeps them beside codes of so many bits.
VOCABULARY = "embedding_rank=16,embedding"
#: What `meswitch compress` does by itself at 1, 2 and 4 bits, as methods.
DEFAULTS = {
    f"{ONE},rank=16,{VOCABULARY}=1": "`--bits 1`",
    f"meswitch:bits=2,salient=8,{OURS},rank=16,factor_bits=8,{VOCABULARY}=1": "`--bits 2`",
    f"meswitch:bits=4,salient=8,{OURS},rank=16,factor_bits=8,{VOCABULARY}=2": "`--bits 4`",
}
#: What it does by itself with a merged LoRA, and the same in narrower factors.
PRODUCTS = {
    f"meswitch:bits=0,rank={rank},factor_bits={bits}": f"`--bits 0 --rank {rank}{told}`"
    for rank in (16, 64)
    for bits, told in ((8, ""), (4, " --factor-bits 4"))
}
#: The row that is what it does by itself with a fine-tune, where that is not the first of `DEFAULTS` and no artifact is
#: measured; None: bit for bit, which is no method (docs/results/sparse.md has what it takes).
OTHER_FORMS = {
    "lora16": "meswitch:bits=0,rank=16,factor_bits=8",
    "lora64": "meswitch:bits=0,rank=64,factor_bits=8",
    "reinforced": None,
}
_ALONE = "--embedding-rank 0 --embedding-bits"
#: Other methods that are an option or two of `meswitch compress`.
OPTIONS = {
    f"{TRELLIS},bits=0.125,rank=16,{VOCABULARY}=0.25": "`--bits 0.125`",
    f"{TRELLIS},bits=0.25,rank=16,{VOCABULARY}=0.25": "`--bits 0.25`",
    f"{TRELLIS},bits=0.5,rank=16,{VOCABULARY}=0.5": "`--bits 0.5`",
    f"{TRELLIS.replace('salient=8', 'salient=2')},bits=0.125,rank=16,{VOCABULARY}=0.25": "`--bits 0.125 --salient 2`",
    f"{TRELLIS.replace('salient=8', 'salient=2')},bits=0.25,rank=16,{VOCABULARY}=0.25": "`--bits 0.25 --salient 2`",
    f"{TRELLIS},bits=0.125,rank=16,embedding=1": f"`--bits 0.125 {_ALONE} 1`",
    f"{TRELLIS},bits=0.25,rank=16,embedding=1": f"`--bits 0.25 {_ALONE} 1`",
    f"{TRELLIS},bits=0.5,rank=16,embedding=1": f"`--bits 0.5 {_ALONE} 1`",
    f"{TRELLIS},bits=0.25,rank=16": f"`--bits 0.25 {_ALONE} 2`",
    f"{TRELLIS},bits=1,rank=16": f"`--bits 1 --code trellis {_ALONE} 2`",
    f"{ONE},rank=16,{VOCABULARY}=0.5": "`--bits 1 --embedding-bits 0.5`",
    f"{ONE},rank=16,{VOCABULARY}=2": "`--bits 1 --embedding-bits 2`",
    f"{ONE},rank=16": f"`--bits 1 {_ALONE} 2`",
    f"{ONE},rank=64": f"`--bits 1 --rank 64 {_ALONE} 2`",
    f"{ONE},rank=0": "`--bits 1 --rank 0`",
    f"meswitch:bits=1,salient=0,channel_scale=rms,{OURS},rank=16,embedding=1": f"`--bits 1 --salient 0 {_ALONE} 1`",
    f"meswitch:bits=2,salient=8,{OURS},rank=16,factor_bits=8": f"`--bits 2 {_ALONE} 2`",
    f"meswitch:bits=2,salient=8,{OURS},rank=16": f"`--bits 2 --factor-bits 4 {_ALONE} 2`",
    f"meswitch:bits=2,salient=8,{OURS}": "`--bits 2 --rank 0`",
    f"meswitch:bits=4,salient=8,{OURS},rank=16,factor_bits=8,embedding=4": f"`--bits 4 {_ALONE} 4`",
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
    *BY_SIZE,
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
#: Which is what a user should have who wants the smallest.
QUARTER = f"{TRELLIS},bits=0.25,rank=16,{VOCABULARY}=0.25"
#: What is measured of the other kinds of fine-tune.
KIND_ROWS = (
    BASE,
    EXPERT,
    BY_ITSELF,
    *DEFAULTS,
    QUARTER,
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
    *list(DEFAULTS)[:2],
    QUARTER,
    QUARTER.replace("salient=8", "salient=2"),
    f"{TRELLIS},bits=0.125,rank=16,{VOCABULARY}=0.25",
    list(BY_SIZE)[1],
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
    f"{TRELLIS},bits=0.5,rank=16,{VOCABULARY}=0.5": "`--bits 0.5`",
    QUARTER: "`--bits 0.25`",
    f"{TRELLIS.replace('salient=8', 'salient=2')},bits=0.25,rank=16,{VOCABULARY}=0.25": "`--bits 0.25 --salient 2`",
    f"{TRELLIS},bits=0.125,rank=16,{VOCABULARY}=0.25": "`--bits 0.125`",
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
    return BY_SIZE.get(row) or DEFAULTS.get(row) or PRODUCTS.get(row) or OPTIONS.get(row) or row
