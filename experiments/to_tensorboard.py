"""Convert the logs of runs to TensorBoard events: every value of training and evaluation by step.

    python experiments/to_tensorboard.py runs/demo [more runs ...]
    tensorboard --logdir runs

Each run gets a folder `tensorboard` when all is written; it replaces an earlier one.
"""

import argparse
import shutil
import sys
from pathlib import Path

from plot_run import read_log
from torch.utils.tensorboard import SummaryWriter


def write_events(run: Path, events: list[dict]):
    """Write every value NAME of the log as `train/NAME` or `eval/NAME`. Prunes show in `train/hidden_size`."""
    folder, work = run / "tensorboard", run / "tensorboard.unfinished"
    shutil.rmtree(work, ignore_errors=True)
    with SummaryWriter(work) as writer:
        for event in events:
            kind, step = event.pop("event"), event.pop("step")
            if kind in ("train", "eval"):
                for name, value in event.items():
                    writer.add_scalar(f"{kind}/{name}", value, step)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run folders of distill.py.")
    args = parser.parse_args(argv)
    try:
        logs = [read_log(run) for run in args.runs]  # a wrong folder is reported before anything is written
        for run, events in zip(args.runs, logs, strict=True):
            write_events(run, events)
            print(run / "tensorboard")
    except (ValueError, OSError) as error:
        print(f"to_tensorboard.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
