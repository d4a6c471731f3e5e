"""Build the zoo: `python tests zoo build [--quick] [--expert NAME] [--cache DIR]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .domains import EXPERTS
from .family import build


def main() -> None:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="build what is missing and print the figures")
    command.add_argument("--quick", action="store_true", help="the size for continuous integration")
    command.add_argument("--expert", choices=EXPERTS, help="only this expert")
    command.add_argument("--cache", type=Path, help="root folder (default: $MESWITCH_ZOO or ~/.cache/meswitch-zoo)")
    arguments = parser.parse_args()

    experts = (arguments.expert,) if arguments.expert else EXPERTS
    zoo = build(arguments.quick, experts, arguments.cache)
    print(zoo.folder)
    row = "{:8} {:>13} {:>13} {:>14} {:>9} {:>8} {:>5}"
    print(row.format("expert", "choice loss", "report loss", "||D||/||W||", "tokens", "seconds", "seed"))
    for name in experts:
        figures = json.loads(zoo.figures_file(name).read_text())
        losses = [
            f"{figures[part]['base_loss']:.3f}>{figures[part]['expert_loss']:.3f}" for part in ("choice", "report")
        ]
        training = figures["training"]
        size = f"{figures['relative_delta']:.2e}"
        print(row.format(name, *losses, size, training["tokens"], training["seconds"], figures["seed"]))


if __name__ == "__main__":
    main()
