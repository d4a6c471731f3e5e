"""The methods that `--baseline` knows, and how its text is read."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from meswitch_cli.errors import UsageError

if TYPE_CHECKING:
    from meswitch_cli.evaluation.baselines.method import Method

#: Module and class by name; a method's file is loaded when it is asked for, so that help has the names without torch.
BASELINES = {
    "bitdelta": "bitdelta.BitDelta",
    "rtn": "rtn.RoundToNearest",
    "per-axis": "per_axis.PerAxis",
    "low-rank": "low_rank.LowRankMethod",
    "delta-come": "delta_come.DeltaCome",
    "d-qrelo": "d_qrelo.DQRelo",
    "dare": "dare.Dare",
    "sparse": "sparse.Sparse",
    "meswitch": "meswitch.MeSwitch",
}


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def parse_method(spec: str) -> Method:
    """Read `NAME[:option=value,...]`.

    Raises:
        UsageError: no such method or option, or a value that it cannot have.
    """
    name, _, rest = spec.partition(":")
    if name not in BASELINES:
        raise UsageError(f"--baseline {spec}: no method {name!r}; there are {', '.join(BASELINES)}")
    module, _, attribute = BASELINES[name].partition(".")
    method: type[Method] = getattr(import_module(f"meswitch_cli.evaluation.baselines.{module}"), attribute)
    hints = get_type_hints(method)
    kinds: dict[str, Any] = {
        field.name: _number if hints[field.name] is float else type(field.default) for field in fields(method)
    }
    options = {}
    for part in rest.split(",") if rest else []:
        key, found, text = part.partition("=")
        if key not in kinds or not found:
            raise UsageError(f"--baseline {spec}: {part!r} is none of its options: {', '.join(sorted(kinds))}")
        try:
            options[key] = kinds[key](text)
        except ValueError as error:
            raise UsageError(f"--baseline {spec}: {key} cannot be {text!r}") from error
    try:
        return method(**options)
    except ValueError as error:
        raise UsageError(f"--baseline {spec}: {error}") from error
