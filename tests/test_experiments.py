"""The scripts in experiments/, on made-up logs."""

import argparse
import functools
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import cuts  # noqa: E402
import experiment  # noqa: E402
import order  # noqa: E402
import plot_run  # noqa: E402
import recipe  # noqa: E402

import data  # noqa: E402
import distill  # noqa: E402
import model  # noqa: E402
import prune  # noqa: E402

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


@pytest.fixture
def small(checkpoint, corpus, tmp_path, monkeypatch):
    """Experiments whose runs are tiny and lie in a folder of the test's own."""
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiment, "BASE", {
        "teacher": checkpoint, "corpus": corpus, "cache_dir": tmp_path / "cache", "steps": 4, "batch-size": 4,
        "seq-length": 16, "eval-every": 1, "log-every": 2, "device": "cpu"})
    made = []
    real = experiment.program
    monkeypatch.setattr(experiment, "program", lambda *words: (made.append(words), real(*words)))
    return made


def test_equal_flags_are_one_run_and_rows_are_what_its_log_says(small):
    rows = experiment.compare({"plain": {}, "random": {"init": "random"}, "again": {}}, [0])
    assert [(row["arm"], row["seed"]) for row in rows] == [("plain", 0), ("random", 0), ("again", 0)]
    assert len(small) == 2 and len({row["run"] for row in rows}) == 2
    assert rows[0]["kl"] == rows[2]["kl"] != rows[1]["kl"] and rows[1]["kl"][0] > rows[0]["kl"][0] == 0
    assert rows[0]["step"] == [0, 1, 2, 3, 4] and rows[0]["tokens"] == [step * 4 * 16 for step in range(5)]
    first, second = (2 * 4 * 16 / line["tokens_per_second"]
                     for line in experiment.events(experiment.RUNS / rows[0]["run"], "train"))
    expected = [0, first / 2, first, first + second / 2, first + second]
    assert rows[0]["seconds"] == pytest.approx(expected, abs=0.06)
    experiment.compare({"plain": {}}, [0])
    assert len(small) == 2
    assert experiment.compare({"plain": {}}, [1])[0]["run"] != rows[0]["run"] and len(small) == 3


def test_a_run_that_was_ended_is_taken_up(small):
    """With a checkpoint it goes on, without one it begins anew."""
    folder = experiment.distil(save_every=1)
    whole = (folder / "student" / "model.safetensors").read_bytes()
    for saved in (False, True):
        (folder / "student").rename(folder / "student.unfinished")
        if saved:
            (folder / "checkpoints" / "1").mkdir(parents=True)
            (folder / "checkpoints" / "1" / "state.json").write_text("{}")
        experiment.distil(save_every=1)
        assert ("--resume" in small[-1]) == saved and (folder / "student" / "model.safetensors").read_bytes() == whole


def curve_row(arm, seed, kl, seconds):
    return {"arm": arm, "seed": seed, "budget": 1000, "step": [0, 1, 2], "tokens": [0, 500, 1000], "seconds": seconds,
            "kl": kl}


def test_gains_at_equal_tokens_and_at_equal_seconds():
    """The recipe ends at 0.3 after 20 s; where another run took 15 s, it was at 0.4 then."""
    rows = [curve_row("as published", 0, [0, 0.9, 0.6], [0, 10, 30]),
            curve_row("single cut at T/30", 0, [0, 0.9, 0.5], [0, 10, 15]),
            curve_row("recipe best", 0, [0, 0.5, 0.3], [0, 10, 20])]
    published, single = recipe.gains(rows)
    assert (published["less_at_equal_tokens"], published["less_at_equal_seconds"]) == (50.0, 50.0)
    assert (single["less_at_equal_tokens"], single["less_at_equal_seconds"]) == (40.0, 20.0)


def test_single_cuts_are_judged_on_as_many_rows_as_asked_for(documents, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(documents * 10) + "\n")
    torch.manual_seed(0)
    bert = model.Bert(model.BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
                                       num_attention_heads=4, intermediate_size=64, max_position_embeddings=128,
                                       initializer_range=0.2))
    (tmp_path / "teacher").mkdir()
    model.save_model(bert, tmp_path / "teacher")
    data.save_tokenizer(tokenizer, tmp_path / "teacher", 128)
    evaluate, counts = distill.evaluate, []
    monkeypatch.setattr(distill, "evaluate", lambda *given: counts.append(given[3]) or evaluate(*given))
    monkeypatch.setattr(distill, "parse_arguments", lambda _: argparse.Namespace(cache_dir=tmp_path / "cache"))
    args = argparse.Namespace(teacher=str(tmp_path / "teacher"), corpus=str(tmp_path / "text.txt"), rows=3, seeds=[4])
    result = cuts.measure(args)
    assert counts == [3] * len(result["rows"]) and result["eval_rows"] == 3
    assert [(row["case"], row["arm"]) for row in result["rows"]] == list(itertools.product(cuts.CASES, cuts.ARMS))
    kl = {(row["case"], row["arm"]): row["kl"] for row in result["rows"]}
    assert all(0 < value < 10 for value in kl.values()) and len(set(kl.values())) == len(kl)
    assert kl["hidden to 7/8", "plain"] < kl["hidden to 1/2", "plain"]


def test_every_part_is_cut_at_its_own_time():
    first, last = prune.Widths(32, 64, 4, 8), prune.Widths(16, 32, 2, 8)
    widths = order.in_order({"heads": 0.1, "hidden": 0.2, "feed-forward": 0.5}, 20)
    path = [widths(step, 0, 0, first, last, 8, 3) for step in range(21)]
    shapes = {2: first._replace(heads=2), 4: first._replace(heads=2, hidden=16), 10: last}
    assert path == [first] * 2 + [shapes[2]] * 2 + [shapes[4]] * 6 + [shapes[10]] * 11


def test_a_run_in_another_order_is_made_once_and_taken_up_in_the_middle(small, monkeypatch, capfd):
    """Step 1 cuts the heads, step 2 the hidden dimensions, step 3 the rest; then the program's own schedule is back."""
    published = prune.scheduled_widths
    call = functools.partial(order.distil_in_order, ("heads", "hidden", "feed-forward"))
    flags = recipe.BEST | {"steps": 30, "save_every": 1}
    folder = experiment.distil("heads-first", call, **flags)
    cuts_made = experiment.events(folder, "cut")
    first, last = prune.Widths(**cuts_made[0]["before"]), prune.Widths(**cuts_made[-1]["after"])
    heads = first._replace(heads=last.heads, head_size=last.head_size)
    assert [(event["step"], prune.Widths(**event["after"])) for event in cuts_made] == [
        (1, heads), (2, heads._replace(hidden=last.hidden)), (3, last)]
    assert experiment.distil("heads-first", pytest.fail, **flags) == folder
    assert folder != experiment.distil(**flags) and len(small) == 1

    def ends_in_step_3(times, steps):
        def widths(step, *given):
            return scheduled(step, *given) if step < 3 else pytest.fail("the machine is lost")

        scheduled = in_order(times, steps)
        return widths

    with monkeypatch.context() as patch:
        in_order = order.in_order
        patch.setattr(order, "in_order", ends_in_step_3)
        with pytest.raises(pytest.fail.Exception, match="lost"):
            experiment.distil("lost", call, **flags)
    assert prune.scheduled_widths is published
    again = experiment.distil("lost", call, **flags)
    assert "resumed after step 2\n" in capfd.readouterr().out
    assert (again / "student/model.safetensors").read_bytes() == (folder / "student/model.safetensors").read_bytes()


def test_curves_and_bars_are_means_over_the_seeds():
    rows = [curve_row("a", seed, [0, 1 + seed, 2 + seed], [0, 10, 20]) for seed in (0, 1)]
    figure, (left, right) = experiment.plt.subplots(1, 2)
    experiment.plot_curves(left, rows, "seconds")
    assert left.lines[0].get_xydata().tolist() == [[0, 0], [10, 1.5], [20, 2.5]]
    experiment.bars(right, rows, lambda row: row["kl"][-1], "KL")
    assert right.patches[0].get_width() == 2.5 and right.texts[0].get_text().strip() == "2.5"
    experiment.plt.close(figure)


def test_fine_tuned_rows_come_in_the_order_asked_for_however_they_were_made(monkeypatch, tmp_path):
    """Panels beside each other share the names of their bars."""
    made = [{"model": f"/{name}", "task": task, "seed": seed, "metrics": {"f1": score, "accuracy": 0.0}}
            for score, (task, name, seed) in enumerate(itertools.product(("rte", "cola", "sst2"), "cba", (1, 0)))]
    asked = []

    def program(script, *arguments):
        asked.extend(map(str, arguments))
        (tmp_path / "finetuned-7").mkdir()
        (tmp_path / "finetuned-7" / "results.json").write_text(json.dumps(made))

    monkeypatch.setattr(experiment, "program", program)
    monkeypatch.setattr(experiment, "RUNS", tmp_path)
    rows = experiment.finetuned({"first": Path("/a"), "then": Path("/c")}, "glue", ["cola", "rte"], [0, 1], 7)
    assert [list(row.values()) for row in rows] == [
        ["first", "cola", 0, 11], ["first", "cola", 1, 10], ["first", "rte", 0, 5], ["first", "rte", 1, 4],
        ["then", "cola", 0, 7], ["then", "cola", 1, 6], ["then", "rte", 0, 1], ["then", "rte", 1, 0]]
    assert " ".join(asked).startswith("--model /a /c --task cola rte --data glue --seeds 0 1 --max-steps 7")


def test_the_command_line_of_an_experiment(monkeypatch, tmp_path):
    """It measures, keeps where the result comes from but not where files lay, and draws; --draw does the last alone."""
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiment, "FIGURES", tmp_path / "figures")
    measured = []

    def measure(args):
        measured.append((args.seeds, args.corpus))
        return {"rows": [{"arm": "a", "kl": 2.0}]}

    def draw(result):
        figure, axis = experiment.plt.subplots()
        experiment.bars(axis, result["rows"], lambda row: row["kl"], "KL")
        return figure

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "toy.py"), *words])
        experiment.main("toy", "A toy.", measure, draw, ("--corpus", {"help": "a text"}))

    with pytest.raises(SystemExit):
        call()  # without a corpus there is nothing to measure
    call("--corpus", str(tmp_path / "text.txt"), "--seeds", "3", "4")
    assert measured == [([3, 4], str(tmp_path / "text.txt"))]
    result = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert result["command"] == "python experiments/toy.py --corpus text.txt --seeds 3 4"
    assert result["rows"][0]["kl"] == 2.0 and result["versions"]["torch"]
    figures = [tmp_path / "figures" / f"toy.{kind}" for kind in ("png", "svg")]
    for path in figures:
        path.unlink()
    call("--draw")
    assert len(measured) == 1 and all(path.is_file() for path in figures)


SAVED = sorted(path.stem for path in (ROOT / "experiments" / "results").glob("*.json"))


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_result_is_whole_and_can_be_drawn(name):
    """It says where it comes from, and the figures beside it and in the README are there."""
    result = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())
    assert {"command", "machine", "versions", "commit", "date"} <= set(result) and result["rows"]
    experiment.plt.close(importlib.import_module(name).draw(result))
    assert all((ROOT / "experiments" / "figures" / f"{name}.{kind}").is_file() for kind in ("png", "svg"))
    assert f"experiments/figures/{name}.png" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("head", [True, False])
def test_onnxruntime_computes_the_same(checkpoint, tmp_path, head, capsys):
    export_onnx = pytest.importorskip("export_onnx")
    bert = model.load_model(checkpoint).eval()
    if not head:
        bert.cls = None
    (tmp_path / "student").mkdir()
    model.save_model(bert, tmp_path / "student")
    path = tmp_path / "student.onnx"
    assert export_onnx.main([str(tmp_path / "student"), str(path)]) == 0
    assert "largest difference" in capsys.readouterr().out
    session = export_onnx.onnxruntime.InferenceSession(path)
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "logits"][:2 if head else 1]
    inputs = export_onnx.example(bert.config.vocab_size, 5, 11)
    hidden = session.run(None, {k: v.numpy() for k, v in zip(export_onnx.INPUTS, inputs, strict=True)})[0]
    with torch.no_grad():
        ours = bert(inputs[0], None, inputs[2], inputs[1]).hidden[-1].numpy()
    np.testing.assert_allclose(hidden[0], ours[0], atol=1e-4)  # the row without padding
    assert export_onnx.main([str(tmp_path / "nowhere"), str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
