"""The scripts in experiments/, on made-up logs."""

import json
import subprocess
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import plot_run  # noqa: E402

CUTS = [{"event": "cut", "step": step, "before": {"hidden": before}, "after": {"hidden": after}}
        for step, before, after in ((2, 32, 24), (5, 24, 16))]
EVALS = [{"event": "eval", "step": step, "kl": step / 10, "mlm_loss": 3.0 + step, "top1": 0.5, "teacher_mlm_loss": 2.5,
          "teacher_top1": 0.6} for step in (0, 5, 10)]


def write_run(folder, events, tail=""):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return folder


def test_the_curves_are_what_the_log_says(tmp_path):
    """Of a run that is going on: the last line is not written to its end."""
    figure = plot_run.draw([write_run(tmp_path / "run", [*EVALS[:2], *CUTS, EVALS[2]], '{"event": "ev')])
    widths, kl, loss, top1 = figure.axes
    assert widths.lines[0].get_xydata().tolist() == [[0, 32], [2, 24], [5, 16], [10, 16]]
    assert kl.lines[0].get_xydata().tolist() == [[0, 0.0], [5, 0.5], [10, 1.0]] and len(kl.lines) == 1
    assert loss.lines[0].get_ydata().tolist() == [3, 8, 13] and list(loss.lines[1].get_ydata()) == [2.5, 2.5]
    assert list(top1.lines[1].get_ydata()) == [0.6, 0.6]


def test_a_run_without_cuts_and_without_a_head(tmp_path):
    train = {"event": "train", "step": 4, "D": 16}
    headless = [{"event": "eval", "step": step, "hidden_mse": 0.1} for step in (0, 4)]
    figure = plot_run.draw([write_run(tmp_path / "run", [headless[0], train, headless[1]])])
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 16], [4, 16]]
    assert not figure.axes[1].lines


def test_as_a_program(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "plot_run.py")]
    runs = [write_run(tmp_path / name, [*EVALS, *CUTS]) for name in ("a", "b")]
    done = subprocess.run([*command, *runs, "--output", tmp_path / "x.svg"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "x.svg").read_text().startswith("<?xml")
    for folder in (tmp_path, write_run(tmp_path / "empty", [])):
        done = subprocess.run([*command, folder], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error" in done.stderr
