"""Other methods' models of an expert, to stand beside the artifact's: a file each, and a line in `registry`."""

from meswitch_cli.evaluation.baselines.registry import BASELINES, parse_method

__all__ = ["BASELINES", "parse_method"]
