"""`python -m meswitch_cli` is `meswitch`."""

from meswitch_cli.app import main

main()
