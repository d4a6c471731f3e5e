"""What the zoo holds, or `build [--quick | --group GROUP] [--expert NAME]`: `python tests zoo [build ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import group
from .domains import EXPERTS
from .family import build
from .finetunes import GROUPS
from .table import table


def main() -> None:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--cache", type=Path, help="root folder (default: $MESWITCH_ZOO or ~/.cache/meswitch-zoo)")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("build", help="build what is missing and print what there is")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the size for continuous integration")
    size.add_argument("--group", choices=GROUPS, help="strong experts, or fine-tunes of other kinds: hours")
    command.add_argument("--expert", help="only this one")
    # Where the option stood before it was the program's.
    command.add_argument("--cache", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.command == "build":
        known = tuple(GROUPS[arguments.group]) if arguments.group else EXPERTS
        if arguments.expert not in (None, *known):
            parser.error(f"--expert {arguments.expert}: expected one of {', '.join(known)}")
        names = (arguments.expert,) if arguments.expert else known
        if arguments.group:
            group.build(arguments.group, names, arguments.cache)
        else:
            build(arguments.quick, names, arguments.cache)
    rows = table(arguments.cache)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
