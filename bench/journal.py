"""A plugin of pytest, `-p bench.journal --journal FILE --stage NAME`: a line a test, and no test runs twice.

A test whose outcome is in FILE is not run again, so a run that was killed goes on where it stopped. Every test runs its
first case before any runs its second: a run that is cut short has seen a bit of everything.

A test that takes more than `SECONDS` (a kernel hangs) ends its process, and so does one after which the card cannot be
used (an illegal address). pytest-xdist then starts another process. Without it, whoever started pytest starts it again:
`lost` names the tests that have begun and have no outcome.
"""

from __future__ import annotations

import faulthandler
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu import UNUSABLE, read, usable, write

SECONDS = 150


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("journal")
    group.addoption("--journal", required=True, type=os.path.abspath, help="the file with a line a test")
    group.addoption("--stage", required=True, help="its name, for these lines")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a process of pytest-xdist: all must leave out the same tests
        config.stash[FINISHED] = set(config.workerinput["finished"])
        return
    journal = Path(config.getoption("--journal"))
    config.stash[FINISHED] = {test for test, line in read(journal).items() if line["outcome"] != "begun"}
    config.pluginmanager.register(Writer(journal, config.getoption("--stage")))


FINISHED = pytest.StashKey[set[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:  # type: ignore[no-untyped-def]
    node.workerinput["finished"] = sorted(node.config.stash[FINISHED])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in config.stash[FINISHED]])
    left = [item for item in items if item.nodeid not in config.stash[FINISHED]]
    seen: Counter[str] = Counter()
    place = {}
    for item in left:
        test = item.nodeid.split("[")[0]
        place[item] = seen[test]
        seen[test] += 1
    items[:] = sorted(left, key=place.__getitem__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with Path(item.config.getoption("--journal")).with_name("hangs.txt").open("a") as stacks:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=stacks)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if not usable():
                os._exit(UNUSABLE)


class Writer:
    """Writes the lines, in the one process that hears of all tests."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        write(self.path, self.stage, nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = str(report.longrepr).strip().splitlines()[-1] if report.failed else ""
            if report.failed and (crash := getattr(report.longrepr, "reprcrash", None)):
                why = crash.message.splitlines()[0]
            write(self.path, self.stage, report.nodeid, report.outcome, why[:300])
