"""A few trials of every fault in tests/faults; `make test-faults` makes hundreds, and says what was tried."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from faults import faults


@pytest.fixture(scope="module")
def report() -> str:
    """Made by a process of its own: it forks, so no thread may run in it."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "faults" / "faults.py"), "--short"],
                          capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("fault", [fault.__name__ for fault in faults.FAULTS])
def test_nothing_is_lost(report, fault):
    told = re.search(rf"^{fault} +(\d+) +(\d+) +0 ", report, re.MULTILINE)
    assert told and int(told[1]) == int(told[2]) >= 2, report
