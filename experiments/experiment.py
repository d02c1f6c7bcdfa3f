"""What the experiments share: runs of distill.py, which are made once and resumed if interrupted, results and pictures.

An experiment is a script with two functions: `measure(args)` returns the results, `draw(result)` a figure of them. The
script makes the runs that do not exist yet in experiments/runs, and writes results/NAME.json and figures/NAME.png. With
--draw it only draws the saved results. `compare` also takes runs from the saved results, of whatever commit; to measure
again, delete these.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RUNS, RESULTS, FIGURES = FOLDER / "runs", FOLDER / "results", FOLDER / "figures"
sys.path.insert(0, str(ROOT))

from support.checkpoint import load_config, load_tokenizer  # noqa: E402
from support.corpus import TEXT, corpus_files, corpus_key  # noqa: E402
from support.errors import InputError  # noqa: E402
from support.files import model_fingerprint  # noqa: E402
from support.run_folder import program_commit  # noqa: E402

# The budget of most experiments: the bundled teacher (4 layers x 256) to half its width, 1,000 steps of 8 x 128 tokens.
# A million tokens, 10 minutes on one core, in the same precision on every machine. Without --teacher, distill.py takes
# the bundled one and --preset demo.
BASE = {"steps": 1000, "batch-size": 8, "eval-every": 100, "eval-rows": 256, "precision": "fp32"}
BUDGET = "bundled teacher, 1,000 steps of 8 x 128 tokens of Wikipedia"
BUNDLED = ROOT / "teachers" / "small"
SINGLE = {"prune_start": 1 / 30, "prune_end": 1 / 30}  # everything is pruned at once

# ---- Runs ----------------------------------------------------------------------------------------------------


def program(script: str, *arguments):
    """Run a program of this project to its end, or exit as it does."""
    if code := subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)]).returncode:
        sys.exit(code)


def run_name(**flags) -> str:
    """The flags that are not in BASE. Of paths only the last part counts."""
    flags = {name.replace("_", "-"): value for name, value in flags.items()}
    name = " ".join(f"{flag} {value}" for flag, value in sorted(flags.items()) if BASE.get(flag) != value)
    return re.sub(r"[^\w.,-]+", "_", re.sub(r"\S+/", "", name)) or "base"


def distil(**flags) -> Path:
    """The folder of the finished run of distill.py with BASE and these flags. Equal flags share one run."""
    output = RUNS / run_name(**flags)
    flags = {name.replace("_", "-"): value for name, value in (BASE | flags).items()}
    if not (output / "student").is_dir():
        command = [f"--{flag}={value}" for flag, value in flags.items() if value is not True]
        command += [f"--{flag}" for flag, value in flags.items() if value is True]
        if (output / "run.json").is_file():
            command = ["--resume"]
        program("distill.py", *command, "--output", output)
    return output


def events(folder: Path, kind: str) -> list[dict]:
    """The lines of one kind in a run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def curve(folder: Path) -> dict[str, list[float]]:
    """A run at every evaluation: step, tokens, seconds of training until then and, with a masked-LM head, KL, masked-LM
    loss, top-1 accuracy."""
    steps, tokens, seconds = [0], [0], [0.0]
    for line in events(folder, "train"):
        seconds.append(seconds[-1] + (line["tokens"] - tokens[-1]) / line["tokens_per_second"])
        steps.append(line["step"])
        tokens.append(line["tokens"])
    evaluations = events(folder, "eval")
    at = [line["step"] for line in evaluations]
    return {"step": at, "tokens": np.interp(at, steps, tokens).tolist(),
            "seconds": np.interp(at, steps, seconds).round(1).tolist(),
            **{key: [line[key] for line in evaluations] for key in ("kl", "masked_lm_loss", "top1")
               if key in evaluations[0]}}


def machine() -> str:
    """The name of this processor."""
    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else []  # none on ARM
    return [*models, platform.machine()][0]


def summary(folder: Path) -> dict:
    """The name of a run that this machine made, the commit that made it, the hashes of its teacher and its text, and
    its curve."""
    record = json.loads((folder / "run.json").read_text())
    return {"run": folder.name, "commit": record["versions"]["commit"], "machine": machine(),
            "teacher": record["teacher"], "corpus": record["corpus"], **curve(folder)}


def origin(corpus: str, teacher: Path) -> dict[str, str]:
    """The hashes of a teacher and of a text, as in run.json. Raises InputError."""
    tokenizer = load_tokenizer(teacher, load_config(teacher).vocab_size)
    key = corpus_key(corpus_files([corpus]), corpus == "demo", tokenizer, TEXT, math.inf)
    return {"teacher": model_fingerprint(teacher), "corpus": key}


def saved_rows(origin: dict[str, str]) -> dict[str, dict]:
    """By name, the runs in the saved results with BASE and this origin. They need not be made again in another
    clone."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return {row["run"]: row for result in results if result["base"] == BASE
            for name, rows in result.items() if name.endswith("rows") for row in rows
            if "run" in row and origin.items() <= row.items()}


def compare(arms: dict[str, dict], seeds: list[int], corpus: str, teacher=None, more=lambda run: {}) -> list[dict]:
    """Every arm (name -> flags) with every seed on a text: rows of `arm`, `seed`, the run's summary and what `more`
    measures of its folder, saved or new. teacher: None for the bundled one. Raises InputError."""
    same = origin(corpus, Path(teacher or BUNDLED))
    rows, saved = {}, saved_rows(same)
    for seed, arm in itertools.product(seeds, arms):
        flags = arms[arm] | {"corpus": corpus, "seed": seed} | ({"teacher": teacher} if teacher else {})
        row = saved.get(run_name(**flags))
        if row is None:
            run = distil(**flags)
            row = summary(run) | more(run)
            if not same.items() <= row.items():
                raise InputError(f"{run} was made from another text or teacher of the same name: delete it")
        rows[arm, seed] = row | {"arm": arm, "seed": seed}
    return [rows[arm, seed] for arm in arms for seed in seeds]


def finetuned(model: Path, data: str, tasks: list[str], flags: list, more=lambda folder: {}) -> dict[str, list[dict]]:
    """Fine-tune a model on these tasks with finetune.py and these flags: task -> for every seed the metrics on dev, and
    what `more` measures of the fine-tuned model's folder."""
    output, metrics = RUNS / "finetuned", {}
    program("finetune.py", "--model", model, "--task", *tasks, "--data", data, "--output", output, *flags)
    for path in sorted(output.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        if result["model"] == str(model) and result["task"] in tasks:
            metrics.setdefault(result["task"], []).append(result["metrics"] | more(path.parent))
    return metrics


def rows_of(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by arm, in the order in which the arms first appear."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["arm"], []).append(row)
    return groups


def over_seeds(rows: list[dict], spread: str) -> str:
    """For the small print of a picture. spread: what its bands or whiskers show."""
    count = len({row["seed"] for row in rows})
    return "one seed" if count == 1 else f"mean and {spread} over {count} seeds"


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- Pictures: at most 1,000 pixels wide as shown, saved at twice that resolution ----------------------------

DPI = 160
OURS, PAPER, OTHER, GREY = "#D55E00", "#0072B2", "#AA4499", "#707070"  # the same in all pictures, colour-blind-safe
COLOURS = {"iterative, t_f = 0.3 T": "#56B4E9",  # a lighter blue
           **dict.fromkeys(("iterative, t_f = 0.7 T", "all losses", "paper's settings",
                            "paper's settings, no masked-LM", "gradually (paper's settings)"), PAPER),
           **dict.fromkeys(("single prune at T/30", "at once"), OTHER),
           **dict.fromkeys(("preset compensated", "preset imitation (no masked-LM)", "at once, aligned heads",
                            "at once, compensated", "at once, both", "single prune, both extensions"), OURS)}
LABELS = {"kl": "KL to the teacher (nats)", "masked_lm_loss": "held-out masked-LM loss (nats)"}
matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.titlesize": "medium"})


def panels(message: str, details: str, columns: int, height: float, width: float = 10, **options):
    """A figure with a row of panels: its message on top, and below what was run."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)
    figure.suptitle(message, fontweight="bold", fontsize="large")
    figure.supxlabel(details, fontsize="small", color=GREY)
    return figure, axes


def plot_curves(axis, rows: list[dict], key: str = "kl"):
    """KL or another value over the steps, one line per arm: the mean over the seeds, with a band from the lowest to the
    highest. Arms without the masked-LM loss are dashed."""
    for arm, group in rows_of(rows).items():
        steps, values = group[0]["step"], np.array([row[key] for row in group])  # (seeds, evaluations)
        style = {"color": COLOURS.get(arm, GREY), "linestyle": "--" if "no masked-LM" in arm else "-"}
        axis.plot(steps, values.mean(0), marker="o", markersize=3, label=arm, **style)
        axis.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axis.set(xlabel="step", ylabel=LABELS[key])
    axis.grid(alpha=0.25)


def plot_dots(axis, rows: list[dict], value, label: str):
    """One dot per arm: the mean of `value(row)`, its standard deviation as a whisker, and the number beside it."""
    groups = rows_of(rows)
    for i, (arm, group) in enumerate(groups.items()):
        mean, deviation = mean_and_deviation([value(row) for row in group])
        axis.errorbar(mean, i, xerr=deviation or None, fmt="o", color=COLOURS.get(arm, GREY), capsize=3)
        axis.annotate(f"{mean:#.3g}", (mean + deviation, i), (8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.4, -0.6)  # the first arm is on top
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.25)
    axis.margins(x=0.3)


# ---- The command line ----------------------------------------------------------------------------------------


def header(argv: list[str]) -> dict:
    """Where, when and how a result was made. Of absolute paths only the names are kept."""
    argv = [re.sub(r"(^|=)/.*/(?=[^/])", r"\1", word) for word in argv]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers")}
    return {"command": shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *argv]),
            "machine": machine(), "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()), "versions": versions,
            "commit": program_commit(), "date": datetime.date.today().isoformat(), "base": BASE}


def main(name: str, description: str, measure, draw, **required_flags: str):
    """The command line of an experiment. required_flags: name -> help, of what `measure` needs besides the seeds."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--draw", action="store_true", help="Only draw the saved results.")
    for flag, text in required_flags.items():
        parser.add_argument(f"--{flag}", required="--draw" not in sys.argv, help=text)
    args = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if not args.draw:
        try:
            result = header(sys.argv[1:]) | measure(args)
        except InputError as error:
            parser.error(str(error))
        path.write_text(json.dumps(result, indent=1) + "\n")
    figure = draw(json.loads(path.read_text()))
    figure.savefig(FIGURES / f"{name}.png", dpi=DPI)
    plt.close(figure)
    print(FIGURES / f"{name}.png")
