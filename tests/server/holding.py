"""`python -m server.holding FILE serve ...` is `meswitch serve`, whose engine is held while the file is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from engine.held import Hold

from meswitch_cli.app import main
from meswitch_cli.engine.transformers_engine import TransformersEngine

#: Batches that are computed nevertheless, so that answers have begun.
AFTER = 3


def hold_while(file: Path) -> None:
    start = TransformersEngine.start

    def held_start(engine: TransformersEngine) -> Any:
        engine.before_batch = Hold(engine, file.exists, AFTER)
        return start(engine)

    TransformersEngine.start = held_start


if __name__ == "__main__":
    hold_while(Path(sys.argv.pop(1)))
    main()
