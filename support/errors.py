"""User errors: anything wrong with flags or files is reported in one line, without a stack trace."""

import contextlib
import os
import re
import sys
from collections.abc import Callable


class InputError(Exception):
    """A mistake in what the user gave. Its message is one line that says what is wrong and how to fix it."""


class LocalError(InputError):
    """An error of one process, which that process prints. Other InputErrors are the same in all processes."""


class Interrupted(Exception):
    """A signal asked the run to stop, and its state has been saved. Arguments: the message and the exit code."""


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run_program(program: str, work: Callable[[], None], resume_hint: str, memory_hint: str) -> int:
    """Run `work` and return the exit code. Errors of the user and of the machine are one line on stderr; what concerns
    all processes alike is printed by the first."""
    from support.distributed import RANK, dist  # imports this module

    for_all = True
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if RANK else sys.stdout):
            work()
        if dist.is_initialized():
            dist.destroy_process_group()  # a process that exits without this may end with SIGABRT
        return 0
    except Interrupted as error:
        message, code = error.args
    except KeyboardInterrupt:
        message, code = f"interrupted; {resume_hint}", 130
    except InputError as error:
        message, code, for_all = f"error: {error}", 2, not isinstance(error, LocalError)
    except (MemoryError, RuntimeError) as error:  # torch's own, or of cuBLAS, cuDNN or NCCL
        if not re.search("MemoryError|[Oo]ut of memory|allocate memory|ALLOC_FAILED", repr(error)):
            raise
        message, code, for_all = f"error: the memory is full; {memory_hint}", 2, False
    except OSError as error:  # a full disk, a folder that may not be written
        message, code, for_all = f"error: {one_line(error)}; {resume_hint}", 2, False
    if RANK == 0 or not for_all:
        print(f"{program}: {message}", file=sys.stderr)
    return code
