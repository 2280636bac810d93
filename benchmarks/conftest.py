"""Collects the rows of a run, prints them at its end, and saves them with --save-results."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import machine
from benchmarks.ceiling import Ceiling, measured_ceiling
from benchmarks.report import describe, plain_table
from benchmarks.rows import RESULTS, Row, save
from benchmarks.timing import Race

_rows = pytest.StashKey[list[Row]]()
_load = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("capsops benchmarks")
    group.addoption(
        "--save-results", action="store_true", help="write the rows to benchmarks/results/<device>.json"
    )
    group.addoption(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of torch (default: 2)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.stash[_load] = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    config.option.benchmark_quiet = True  # our table stands in place of the plugin's, which -v brings back
    # torch's own, from within torch.compile
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")
    torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))  # a case takes as long as it takes


@pytest.fixture(scope="session")
def threads(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--threads")


@pytest.fixture(scope="session")
def ceiling(threads: int) -> Ceiling:
    return measured_ceiling(threads)


@pytest.fixture
def race(benchmark: object) -> Iterator[Callable[..., Race]]:
    """Runs a race whose candidate "ours" is what pytest-benchmark times; the others run in between."""

    def start(
        ours: Callable[[], object], others: dict[str, Callable[[], object]], hopeless: float = 4
    ) -> Race:
        """Others that take `hopeless` times as long as the fastest of them are timed in the warm-up only."""
        race = Race({"ours": ours, **others})
        race.warm_up()
        race.drop(others, hopeless)
        racing = [name for name in race.candidates if name != "ours"]
        benchmark.extra_info["calls per round"] = race.calls["ours"]
        benchmark.pedantic(race.lap, args=(["ours"],), setup=lambda: race.lap(racing), rounds=race.rounds())
        benchmark.extra_info["seconds"] = race.medians()
        return race

    yield start
    torch.compiler.reset()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the run's table."""
    return request.config.stash[_rows].append


def _header(config: pytest.Config) -> dict[str, object]:
    ceiling = measured_ceiling(config.getoption("--threads"))
    command = ["pytest", *map(str, config.invocation_params.args)]
    return {
        **machine.provenance(command),
        "device": {**machine.cpu(), "load_before": config.stash[_load]},
        "ceiling": ceiling._asdict(),
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    header = _header(config)
    write = terminalreporter.write_line
    terminalreporter.section("capsops against plain PyTorch")
    for suite in dict.fromkeys(row.suite for row in rows):
        write(f"\n{suite}")
        for line in plain_table([row for row in rows if row.suite == suite]):
            write(line)
    write(f"\n{describe(header)}")
    targets = [target for row in rows for target in row.targets]
    write(f"{sum(target.met for target in targets)} of {len(targets)} targets met")
    if config.getoption("--save-results"):
        if exitstatus != pytest.ExitCode.OK:
            write("not saved: a benchmark failed")
            return
        path = RESULTS / f"cpu-{machine.slug(machine.cpu_model())}.json"
        save(path, header, rows)
        write(f"saved {path.relative_to(machine.ROOT)}")
