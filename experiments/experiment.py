"""What every experiment needs: runs of distill.py that are made once and taken up where they stopped, results that are
kept with how they came about, figures.

An experiment is a script with a function that measures, which returns rows, and one that draws them. Calling it makes
the runs that are not there yet, in experiments/runs, and writes results/NAME.json, figures/NAME.png and .svg. With
--draw it only draws what was saved.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
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

matplotlib.rcParams["svg.hashsalt"] = "the same file from the same result"
FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RUNS, RESULTS, FIGURES = FOLDER / "runs", FOLDER / "results", FOLDER / "figures"
sys.path.insert(0, str(ROOT))

# The budget of the ablations: the bundled teacher (4 layers x 256) on the demonstration's text, to half its width, 200
# steps of 8 x 128 tokens, 0.2 million in all: minutes on one core.
BASE = {"steps": 200, "batch-size": 8, "eval-every": 25}
BUDGET = "200 steps of 8 x 128 tokens"
TASKS = ["cola", "sst2", "mrpc", "stsb", "rte"]


def program(script: str, *arguments):
    """Run a program of this project to its end; its output is this one's."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True)


def distil(label: str = "", call=None, **flags) -> Path:
    """The folder of the finished run of distill.py with BASE and these flags. Equal flags are one run, whoever asks.

    Instead of the program, `call` may be given its arguments; such runs are told apart by their label.
    """
    flags = {name.replace("_", "-"): value for name, value in (BASE | flags).items()}
    name = " ".join([label, *(f"{flag} {value}" for flag, value in sorted(flags.items()) if BASE.get(flag) != value)])
    output = RUNS / (re.sub(r"[^\w.,-]+", "_", re.sub(r"\S+/", "", name.strip())) or "as_published")
    if not (output / "student").is_dir():
        command = [word for flag, value in flags.items()
                   for word in ([f"--{flag}"] if value is True else [f"--{flag}", str(value)])]
        command = ["--resume"] if any(output.glob("checkpoints/*/*")) else [*command, "--overwrite"]
        (call or functools.partial(program, "distill.py"))(*command, "--output", output)
    return output


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if event["event"] == kind]


def curve(folder: Path) -> dict[str, list[float]]:
    """Of one run, at every evaluation: step, tokens, seconds of training until then, KL, masked-LM loss, top-1."""
    steps, tokens, seconds = [0], [0], [0.0]
    for line in events(folder, "train"):
        seconds.append(seconds[-1] + (line["tokens"] - tokens[-1]) / line["tokens_per_second"])
        steps.append(line["step"])
        tokens.append(line["tokens"])
    evaluations = events(folder, "eval")
    at = [line["step"] for line in evaluations]
    return {"step": at, "tokens": np.interp(at, steps, tokens).tolist(),
            "seconds": np.interp(at, steps, seconds).round(1).tolist(),
            **{key: [line[key] for line in evaluations] for key in ("kl", "mlm_loss", "top1")}}


def compare(arms: dict[str, dict], seeds: list[int]) -> list[dict]:
    """Every arm (name -> flags) with every seed: rows of `arm`, `seed` and the curve, seed after seed."""
    folders = {(arm, seed): distil(**flags, seed=seed) for seed in seeds for arm, flags in arms.items()}
    return [{"arm": arm, "seed": seed, "run": folders[arm, seed].name, **curve(folders[arm, seed])}
            for arm in arms for seed in seeds]


def finetuned(models: dict[str, Path], data: str, tasks: list[str], seeds: list[int], steps: int) -> list[dict]:
    """Rows of `arm`, `task`, `seed` and the first of the task's metrics, in percent, on dev, in the order asked for."""
    output = RUNS / f"finetuned-{steps}"
    program("finetune.py", "--model", *models.values(), "--task", *tasks, "--data", data, "--seeds", *seeds,
            "--max-steps", steps, "--learning-rate", 2e-4, "--precision", "bf16", "--output", output)
    scores = {(entry["model"], entry["task"], entry["seed"]): next(iter(entry["metrics"].values()))
              for entry in json.loads((output / "results.json").read_text())}
    return [{"arm": arm, "task": task, "seed": seed, "score": scores[str(folder), task, seed]}
            for arm, folder in models.items() for task in tasks for seed in seeds]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def rows_of(rows: list[dict], key: str = "arm") -> dict[str, list[dict]]:
    """The rows by the value of a key, in the order in which the values come first."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def plot_curves(axis, rows: list[dict], x: str = "step", y: str = "kl"):
    """One line an arm: the mean over its seeds; the band is from the lowest to the highest."""
    for arm, group in rows_of(rows).items():
        xs = [statistics.fmean(values) for values in zip(*(row[x] for row in group), strict=True)]
        columns = list(zip(*(row[y] for row in group), strict=True))
        line, = axis.plot(xs, [statistics.fmean(column) for column in columns], label=arm)
        axis.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.15)
    axis.set_xlabel({"step": "step", "tokens": "tokens", "seconds": "seconds of training"}[x])
    axis.set_ylabel("KL to the teacher, nats" if y == "kl" else y)
    axis.grid(alpha=0.3)


def bars(axis, rows: list[dict], value, label: str):
    """One bar an arm: the mean of `value(row)`, its standard deviation as a whisker and the number beside it."""
    groups = rows_of(rows)
    for i, group in enumerate(groups.values()):
        mean, spread = mean_and_spread([value(row) for row in group])
        axis.barh(i, mean, xerr=spread, color="C0", alpha=0.8)
        axis.text(mean + spread, i, f" {mean:.3g}", va="center", fontsize="small")
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    axis.margins(x=0.15)
    axis.set_xlabel(label)


def header(argv: list[str]) -> dict:
    """Where, when, with what and how a result was made. Files are told by their names, wherever they lay."""
    argv = [Path(word).name if os.sep in word else word for word in argv]
    cpu = Path("/proc/cpuinfo")
    machine = re.findall(r"model name\s*: (.*)", cpu.read_text())[0] if cpu.is_file() else platform.machine()
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers")}
    return {"command": shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *argv]),
            "machine": machine, "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()), "versions": versions,
            "commit": commit.stdout.strip(), "date": datetime.date.today().isoformat(), "base": BASE}


def main(name: str, description: str, measure, draw, *flags: tuple[str, dict]):
    """The command line of an experiment. `measure(args)` returns what is saved beside the header; `draw(result)` a
    figure of it."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--draw", action="store_true", help="only draw the saved result")
    for flag, options in flags:  # what has no default is needed to measure, not to draw
        parser.add_argument(flag, required="default" not in options and "--draw" not in sys.argv, **options)
    args = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if not args.draw:
        result = header(sys.argv[1:]) | measure(args)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    figure = draw(json.loads(path.read_text()))
    FIGURES.mkdir(exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(FIGURES / f"{name}.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    print(FIGURES / f"{name}.png")
