"""A row of results: every form is checked, then all take turns at being timed."""

from collections.abc import Callable, Mapping
from functools import partial

import capsops
from benchmarks.rows import Row
from capsops import dispatch
from capsops.measuring import peers
from capsops.measuring.cases import Case, Form, exact, plain
from capsops.measuring.ceiling import measured_ceiling
from capsops.measuring.comparison import check
from capsops.measuring.operations import operations
from capsops.measuring.passes import run
from capsops.measuring.timing import Race

StartRace = Callable[..., Race]  # runs a race between candidates, of which one is "ours"


def forms(case: Case) -> dict[str, Form]:
    """ "ours" and the peers, eager and under torch.compile."""
    return {"ours": getattr(capsops, case.op), **peers.with_compiled(peers.FORMS[case.op])}


def measure(suite: str, case: Case, passes: str, candidates: Mapping[str, Form], race: StartRace) -> Row:
    """Errors, times and share of the ceiling. Nothing is timed unless every candidate is right."""
    inputs, grad = case.inputs()
    calls = {name: partial(run, case.bind(form), passes, inputs, grad) for name, form in candidates.items()}
    truth = plain(case, passes), exact(case, passes), case.terms
    errors = {name: check(name, call(), *truth) for name, call in calls.items()}
    row = Row(suite, case.op, str(case), passes, case.precision, dispatch.automatic("cpu"))
    row.error = errors["ours"]
    row.take_times(race(calls))
    if case.op == "capsule_routing":
        row.operations = operations(case, passes).flops
        row.share = row.operations / row.seconds / measured_ceiling().flops
    return row
