"""Draws what runs have logged: widths, KL to the teacher, masked-LM loss and top-1 over the steps.

    python experiments/plot_run.py runs/demo [more runs ...] --output run.png

A run folder needs nothing but its log.jsonl, so runs that are still going on can be drawn, too.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = (("D", "hidden width D"), ("kl", "KL to the teacher, nats"), ("mlm_loss", "held-out masked-LM loss"),
          ("top1", "held-out top-1"))


def read_log(folder: Path) -> list[dict]:
    """The events of a run, without a last line that is not written to its end. Raises ValueError."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no log.jsonl")
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    events = [json.loads(line) for line in whole]
    if not any(event["event"] == "eval" for event in events):
        raise ValueError(f"{path} holds no evaluation yet")
    return events


def width_steps(events: list[dict]) -> tuple[list[int], list[int]]:
    """Steps and hidden widths of the staircase, from step 0 to the last event."""
    cuts = [event for event in events if event["event"] == "cut"]
    last = max(event["step"] for event in events)
    if not cuts:
        widths = {event["D"] for event in events if event["event"] == "train"}
        return ([0, last], [widths.pop()] * 2) if widths else ([], [])
    steps = [0, *(cut["step"] for cut in cuts), last]
    widths = [cuts[0]["before"]["hidden"], *(cut["after"]["hidden"] for cut in cuts)]
    return steps, [*widths, widths[-1]]


def draw(runs: list[Path], title: str = ""):
    """A figure of four panels with a curve for every run; the teacher is the dashed line."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for run in runs:
        events = read_log(run)
        evaluations = [event for event in events if event["event"] == "eval"]
        for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if key == "D":
                axis.step(*width_steps(events), where="post", label=run.name)
            elif key in evaluations[0]:
                line, = axis.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], "o-", markersize=3,
                                  label=run.name)
                if f"teacher_{key}" in evaluations[0]:
                    axis.axhline(evaluations[0][f"teacher_{key}"], color=line.get_color(), linestyle="--", linewidth=1)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of distill.py")
    parser.add_argument("--output", type=Path, default=Path("run.png"), help="a .png, .svg or .pdf [%(default)s]")
    args = parser.parse_args(argv)
    try:
        figure = draw(args.runs, " and ".join(run.name for run in args.runs[:4]))
        figure.savefig(args.output, dpi=150)
    except (ValueError, OSError) as error:
        print(f"plot_run.py: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
