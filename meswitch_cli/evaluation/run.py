"""The whole of `meswitch eval`."""

from __future__ import annotations

from meswitch_cli.errors import Interrupted
from meswitch_cli.evaluation.job import OnStep, Request, claim, finish, judge, measure_fidelity, prepare
from meswitch_cli.evaluation.report import Report
from meswitch_cli.evaluation.routing import check_router, measure_router
from meswitch_cli.evaluation.task_job import measure_tasks


def evaluate(request: Request, on_step: OnStep = lambda what: None) -> Report:
    """Compare base, full experts and compressed models, and write the report into the request's folder.

    What cannot be measured is among the report's errors; `on_step` hears what is being done.

    Raises:
        Interrupted: the user stopped it; what was measured is in the folder.
        MeswitchError: something is missing, damaged, or does not belong together; nothing has been measured.
    """
    evaluation = prepare(request)
    check_router(evaluation)
    claim(evaluation)
    for problem in evaluation.report.errors:
        on_step(f"{problem['where']}: left out: {problem['message']}")
    try:
        measure_fidelity(evaluation, on_step)
        runs = measure_tasks(evaluation, on_step)
        measure_router(evaluation, runs, on_step)
        judge(evaluation)
        finish(evaluation)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what was measured is in {request.out}") from None
    return evaluation.report
