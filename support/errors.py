"""User errors: anything wrong with flags or files is reported in one line, without a stack trace."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """A mistake in what the user gave. Its message is one line that says what is wrong and how to fix it."""


class Interrupted(Exception):
    """A signal asked the run to stop, and its state has been saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def run_program(program: str, work: Callable[[], None], resume_hint: str, memory_hint: str) -> int:
    """Run `work` and return the exit code. Errors of the user and of the machine are one line on stderr; what concerns
    all processes alike is printed by the first."""
    import torch

    from support import distributed  # imports this module

    for_all = True
    try:
        with distributed.rank0_stdout():
            work()
            distributed.cleanup_distributed()
        return 0
    except Interrupted as error:
        message, code = str(error), 128 + error.signal_number
    except KeyboardInterrupt:
        message, code = f"interrupted; {resume_hint}", 130
    except InputError as error:
        message, code = f"error: {error}", 2
    except torch.OutOfMemoryError:
        message, code, for_all = f"error: the GPU's memory is full; {memory_hint}", 2, False
    except OSError as error:  # a full disk, a folder that may not be written
        message, code, for_all = f"error: {one_line(error)}; {resume_hint}", 2, False
    if distributed.RANK == 0 or not for_all:
        print(f"{program}: {message}", file=sys.stderr)
    return code
