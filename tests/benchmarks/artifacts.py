"""Artifacts of the zoo's experts, compressed once and kept beside the zoo for every benchmark that needs them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import zoo
from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings

FOLDER = Path.home() / ".cache" / "meswitch-zoo" / "artifacts"
SAMPLES, SEQUENCE_LENGTH = 32, 512


def artifact_of(expert: str, *, calibrated: bool = False, **settings: Any) -> Path:
    """The artifact of an expert with these settings; `calibrated` takes its training items."""
    family = zoo.paths()
    file = read_calibration(family.calibration[expert]) if calibrated else None
    chosen = CompressionSettings(
        **settings,
        **({"calibration": file.sha256} if file else {}),
        samples=SAMPLES,
        sequence_length=SEQUENCE_LENGTH,
    )
    digest = hashlib.sha256(json.dumps(chosen.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    out = FOLDER / f"{expert}-{digest}"
    if not (out / MANIFEST_FILE).exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        compress(prepare(str(family.base), str(family.experts[expert]), out, chosen, file))
    return out
