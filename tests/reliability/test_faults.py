"""A few trials of every fault in faults.py. `make test-faults` runs hundreds and prints what was tried."""

import re
import subprocess
import sys
from pathlib import Path

import faults
import pytest


@pytest.fixture(scope="module")
def report() -> str:
    """The output of faults.py in a process of its own: it forks, so it must not have threads."""
    done = subprocess.run([sys.executable, Path(faults.__file__), "--short"], capture_output=True, text=True,
                          timeout=600)
    return done.stdout + done.stderr


@pytest.mark.parametrize("fault", [fault.__name__ for fault in faults.FAULTS])
def test_nothing_is_lost(report, fault):
    line = re.search(rf"^{fault} +(\d+) +(\d+) +0 ", report, re.MULTILINE)
    assert line and int(line[1]) == int(line[2]) >= 2, report
