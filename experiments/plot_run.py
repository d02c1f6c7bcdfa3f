"""Plot what runs have logged: hidden size, KL to the teacher, masked-LM loss and top-1 accuracy over the steps.

    python experiments/plot_run.py runs/demo [more runs ...] --output run.png

A run folder needs nothing but its log.jsonl, so a run can be plotted while it trains.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = {"hidden_size": "hidden size", "kl": "KL to the teacher (nats)",
          "masked_lm_loss": "held-out masked-LM loss (nats)", "top1": "held-out top-1 accuracy"}


def read_log(folder: Path) -> list[dict]:
    """The events of a run, without a last line that is not complete yet. Raises ValueError."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no log.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not any(event["event"] == "eval" for event in events):
        raise ValueError(f"{path} contains no evaluation yet")
    return events


def hidden_sizes(events: list[dict]) -> tuple[list[int], list[int]]:
    """Steps and hidden sizes of the staircase, from step 0 to the last event."""
    prunes = [event for event in events if event["event"] == "prune"]
    last = max(event["step"] for event in events)
    if not prunes:
        sizes = [event["hidden_size"] for event in events if event["event"] == "train"]
        return ([0, last], [sizes[0]] * 2) if sizes else ([], [])
    sizes = [prunes[0]["before"]["hidden_size"], *(prune["after"]["hidden_size"] for prune in prunes)]
    return [0, *(prune["step"] for prune in prunes), last], [*sizes, sizes[-1]]


def draw(runs: list[Path]):
    """A figure of four panels with a line per run. The dashed line is the teacher."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for run in runs:
        events = read_log(run)
        evaluations = [event for event in events if event["event"] == "eval"]
        for axis, (key, label) in zip(axes.flat, PANELS.items(), strict=True):
            axis.set_ylabel(label)
            axis.grid(alpha=0.25)
            if key == "hidden_size":
                axis.step(*hidden_sizes(events), where="post", label=run.name)
            elif key in evaluations[0]:
                line, = axis.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], "o-", markersize=3)
                if f"teacher_{key}" in evaluations[0]:
                    axis.axhline(evaluations[0][f"teacher_{key}"], color=line.get_color(), linestyle="--", linewidth=1)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run folders of distill.py.")
    parser.add_argument("--output", type=Path, default=Path("run.png"), help="Picture to write. [%(default)s]")
    args = parser.parse_args(argv)
    try:
        draw(args.runs).savefig(args.output, dpi=160)
    except (ValueError, OSError) as error:
        print(f"plot_run.py: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
