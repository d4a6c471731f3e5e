"""The picture of an artifact: error and size by layer and projection."""

from __future__ import annotations

from pathlib import Path

from meswitch_cli.artifact.disk import disk_errors
from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.commands.report import by_projection
from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.plot_labels import plain_label

FORMATS = (".png", ".svg")


def plot_artifact(manifest: Manifest, path: Path) -> None:
    """Draw to a PNG or SVG file.

    Raises:
        UsageError: another kind of file is asked for.
        MeswitchError: matplotlib is not installed, or there is nothing to draw.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the file must end in {' or '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MeswitchError("--plot needs matplotlib: pip install 'meswitch[plot]'") from error
    groups = {
        kind: [entry for entry in entries if entry.layer is not None]
        for kind, entries in by_projection(manifest).items()
    }
    groups = {kind: entries for kind, entries in groups.items() if entries}
    if not groups:
        raise MeswitchError("nothing to draw: the artifact has no compressed layer")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    errors, sizes = figure.subplots(2, 1, sharex=True)
    bottom = [0.0] * manifest.num_layers
    for kind, entries in groups.items():
        layers = [entry.layer for entry in entries]
        measured = [entry.output_error if entry.output_error is not None else entry.weight_error for entry in entries]
        errors.plot(layers, [100 * (value or 0.0) for value in measured], marker="o", markersize=3, label=kind)
        heights = [0.0] * manifest.num_layers
        for entry in entries:
            heights[entry.layer or 0] += entry.nbytes / 1e6
        sizes.bar(range(manifest.num_layers), heights, bottom=bottom, label=kind)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    calibrated = any(entry.output_error is not None for entries in groups.values() for entry in entries)
    errors.set_ylabel(f"relative {'output' if calibrated else 'weight'} error, %")
    errors.set_ylim(bottom=0)
    errors.grid(alpha=0.3)
    sizes.set_ylabel("size, MB")
    sizes.set_xlabel("decoder layer")
    errors.legend(ncols=4, fontsize="small")
    title = f"{manifest.expert.id} against {manifest.base.id}, {manifest.nbytes / 1e6:.1f} MB"
    figure.suptitle(plain_label(title))
    with disk_errors(path):
        figure.savefig(path, dpi=150)
