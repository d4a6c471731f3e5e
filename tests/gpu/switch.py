"""Part: experts come and go while others generate."""

from __future__ import annotations

import resource
import sys

from gpu.engine import started
from gpu.figures import say
from gpu.load import Load, quantile, run
from gpu.model import Model, parser

#: Slots: all but one hold the experts of the steady requests.
SLOTS = 4
#: Experts that come and go.
VISITS = 4


def main() -> None:
    arguments = parser()
    arguments.add_argument("--bits", required=True)
    options = arguments.parse_args()
    model = Model(options.scratch, options.tiny)
    sizes = model.sizes
    slots = min(SLOTS, sizes.experts - 1)
    experts = model.experts(options.bits, sizes.experts)
    names = list(experts)
    steady, others = names[: slots - 1], names[slots - 1 :]
    engine = started(model, f"{options.bits} bit, {slots} slots", experts, slots=slots, max_wait=0.2)
    try:
        with model.measuring():
            for name in steady:
                engine.pin_expert(name)
            run(engine, steady, len(steady), sizes.prompt, 8)
            run(engine, others[:1], 1, sizes.prompt, 4)
            for source in ("disk", "host"):
                before = engine.statistics()
                alone = run(engine, steady, len(steady), sizes.prompt, sizes.new)
                quiet = [seconds for gaps in alone.gaps.values() for _, seconds in gaps]
                load = Load(engine)
                held = [load.add(name, sizes.prompt, sizes.steady) for name in steady]
                visits = []
                for name in others[-VISITS:]:  # for the first time, then again
                    visit = Load(engine)
                    visit.add(name, sizes.prompt, 4)
                    visits.append(visit.wait())
                until = visits[-1].ended
                load.cancel()
                after = engine.statistics()
                busy = [seconds for name in held for moment, seconds in load.gaps[name] if moment <= until]
                if not busy:
                    raise SystemExit("the steady requests ended before the first load: give them more tokens")
                loads, seconds = (
                    after.slot_loads - before.slot_loads,
                    after.slot_load_seconds - before.slot_load_seconds,
                )
                say(
                    "switch",
                    source=f"first from {source}",
                    loads=loads,
                    gb_a_load=(after.slot_load_bytes - before.slot_load_bytes) / 1e9 / max(loads, 1),
                    gb_per_second=(after.slot_load_bytes - before.slot_load_bytes) / 1e9 / max(seconds, 1e-9),
                    ms_a_load=1e3 * seconds / max(loads, 1),
                    first_token_ms_p50=1e3 * quantile([t for visit in visits for t in visit.first_token.values()], 0.5),
                    first_token_ms_max=1e3 * max(t for visit in visits for t in visit.first_token.values()),
                    gap_ms_p50_quiet=1e3 * quantile(quiet, 0.5),
                    gap_ms_p99_quiet=1e3 * quantile(quiet, 0.99),
                    gap_ms_p50_loading=1e3 * quantile(busy, 0.5),
                    gap_ms_p99_loading=1e3 * quantile(busy, 0.99),
                    gap_ms_max_loading=1e3 * max(busy),
                    resident_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                    errors=sorted(load.errors.union(*(visit.errors for visit in visits))),
                )
                if loads < len(visits) - 1:
                    raise SystemExit(f"{loads} loads for {len(visits)} visits: the experts did not come and go")
    finally:
        engine.stop()


if __name__ == "__main__":
    sys.exit(main())
