"""The scripts in experiments/, on made-up logs and on the saved results."""

import argparse
import importlib
import itertools
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import experiment  # noqa: E402
import plot_run  # noqa: E402

import distill  # noqa: E402

PRUNES = [{"event": "prune", "step": step, "before": {"hidden_size": before}, "after": {"hidden_size": after}}
          for step, before, after in ((2, 32, 24), (5, 24, 16))]
EVALS = [{"event": "eval", "step": step, "kl": step / 10, "masked_lm_loss": 3.0 + step, "top1": 0.5,
          "teacher_masked_lm_loss": 2.5, "teacher_top1": 0.6} for step in (0, 5, 10)]


def write_run(folder, events, tail=""):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return folder


# ---- plot_run.py ---------------------------------------------------------------------------------------------


def test_the_curves_of_an_unfinished_run_are_those_of_its_log(tmp_path):
    figure = plot_run.draw([write_run(tmp_path / "run", [*EVALS[:2], *PRUNES, EVALS[2]], '{"event": "ev')])
    sizes, kl, loss, top1 = figure.axes
    assert sizes.lines[0].get_xydata().tolist() == [[0, 32], [2, 24], [5, 16], [10, 16]]
    assert kl.lines[0].get_xydata().tolist() == [[0, 0.0], [5, 0.5], [10, 1.0]] and len(kl.lines) == 1
    assert loss.lines[0].get_ydata().tolist() == [3, 8, 13] and list(loss.lines[1].get_ydata()) == [2.5, 2.5]
    assert list(top1.lines[1].get_ydata()) == [0.6, 0.6]


def test_a_run_without_prunes_and_without_a_head_is_plotted(tmp_path):
    train = {"event": "train", "step": 4, "hidden_size": 16}
    headless = [{"event": "eval", "step": step, "hidden_mse": 0.1} for step in (0, 4)]
    figure = plot_run.draw([write_run(tmp_path / "run", [headless[0], train, headless[1]])])
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 16], [4, 16]]
    assert not figure.axes[1].lines


def test_plot_run_writes_a_picture_or_a_one_line_error(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, [*EVALS, *PRUNES])) for name in ("a", "b")]
    assert plot_run.main([*runs, "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for folder in (tmp_path, write_run(tmp_path / "empty", [])):
        assert plot_run.main([str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "error" in message


# ---- to_tensorboard.py ---------------------------------------------------------------------------------------


def test_tensorboard_reads_every_training_and_evaluation_value_of_the_log(tmp_path):
    """Those of the last call only."""
    to_tensorboard = pytest.importorskip("to_tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = [{"event": "train", "step": step, "loss": 9 / step, "loss_mlm": 7 / step, "hidden_size": 32 - step,
              "learning_rate": 1e-4 * step} for step in (2, 4)]
    run = write_run(tmp_path / "run", [*EVALS[:2], *PRUNES, *train, EVALS[2]])
    assert to_tensorboard.main([str(run)]) == 0
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)[:-1]
    (run / "log.jsonl").write_text("".join(lines))
    assert to_tensorboard.main([str(run)]) == 0
    expected = {}
    for event in map(json.loads, lines):
        if event["event"] != "prune":
            for name in event.keys() - {"event", "step"}:
                expected.setdefault(f"{event['event']}/{name}", []).append((event["step"], event[name]))
    written = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(written.Tags()["scalars"]) == set(expected) > {"train/learning_rate", "eval/kl"}
    for name, points in expected.items():
        steps, values = zip(*points, strict=True)
        assert [point.step for point in written.Scalars(name)] == list(steps)
        assert [point.value for point in written.Scalars(name)] == pytest.approx(values)
    assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "tensorboard"]


def test_to_tensorboard_writes_nothing_if_one_folder_is_no_run(tmp_path, capsys):
    to_tensorboard = pytest.importorskip("to_tensorboard")
    run = write_run(tmp_path / "run", EVALS)
    assert to_tensorboard.main([str(run), str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "log.jsonl" in message
    assert [path.name for path in run.iterdir()] == ["log.jsonl"]


# ---- experiment.py -------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Experiments in the test's folder, with made-up logs instead of runs; returns the command lines."""
    commands = []

    def program(script, *words):
        commands.append(list(map(str, words)))
        train = [{"event": "train", "step": step, "tokens": 100 * step, "tokens_per_second": speed}
                 for step, speed in ((5, 50), (10, 100))]
        if "--resume" not in words:
            write_run(Path(words[-1]), [*EVALS, *train])
            origin = {"versions": {"commit": "abc"}, "teacher": "T", "corpus": "C"}
            (Path(words[-1]) / "run.json").write_text(json.dumps(origin))
        (Path(words[-1]) / "student").mkdir()

    monkeypatch.setattr(experiment, "program", program)
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "origin", lambda corpus, teacher: {"teacher": "T", "corpus": "C"})
    return commands


def test_equal_flags_share_one_run_and_its_curve_is_that_of_its_log(logged):
    rows = experiment.compare({"plain": {}, "random": {"init": "random"}, "again": {}}, [0, 1], corpus="text.txt")
    assert [(row["arm"], row["seed"]) for row in rows] == list(itertools.product(("plain", "random", "again"), (0, 1)))
    assert len(logged) == len({tuple(command) for command in logged}) == 4
    assert "--seed=1" in logged[2] and {"--steps=1000", "--corpus=text.txt"} < set(logged[2])
    assert rows[0]["step"] == [0, 5, 10] and rows[0]["tokens"] == [0, 500, 1000] and rows[0]["kl"] == [0.0, 0.5, 1.0]
    assert rows[0]["seconds"] == [0, 10, 15]
    assert [rows[0][key] for key in ("commit", "machine", "teacher", "corpus")] == [
        "abc", experiment.machine(), "T", "C"]
    experiment.compare({"plain": {}}, [0], corpus="text.txt")
    assert len(logged) == 4


def test_runs_in_the_saved_results_are_not_made_again(logged, tmp_path, monkeypatch):
    rows = experiment.compare({"plain": {}}, [0, 1], corpus="folder/text.txt")
    (tmp_path / "some.json").write_text(json.dumps({"base": experiment.BASE, "rows": rows}))
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "of another machine")
    again = experiment.compare({"renamed": {}, "random": {"init": "random"}}, [0, 1], corpus="text.txt")
    assert again[:2] == [row | {"arm": "renamed"} for row in rows]
    assert [row["run"] for row in again] == [
        "corpus_text.txt_seed_0", "corpus_text.txt_seed_1",
        "corpus_text.txt_init_random_seed_0", "corpus_text.txt_init_random_seed_1"]
    assert len(logged) == 4 and {"--init=random"} < set(logged[2])
    with monkeypatch.context() as patch:
        patch.setitem(experiment.BASE, "steps", 10)
        experiment.compare({"plain": {}}, [0], corpus="text.txt")
    assert len(logged) == 5
    monkeypatch.setattr(experiment, "origin", lambda corpus, teacher: {"teacher": "T", "corpus": "another text"})
    with pytest.raises(experiment.InputError, match="made from another text or teacher of the same name"):
        experiment.compare({"plain": {}}, [1], corpus="text.txt")
    assert len(logged) == 6


def test_what_is_measured_of_a_run_is_saved_with_it(logged, tmp_path, monkeypatch):
    def compare(more):
        return experiment.compare({"plain": {}}, [0], corpus="text.txt", teacher="some/bert", more=more)

    rows = compare(lambda folder: {"score": len(experiment.events(folder, "train"))})
    assert rows[0]["score"] == 2 and rows[0]["kl"] and rows[0]["run"] == "corpus_text.txt_seed_0_teacher_bert"
    assert "--teacher=some/bert" in logged[0]
    saved = {"base": experiment.BASE, "rows": [], "other_rows": rows}
    (tmp_path / "some.json").write_text(json.dumps(saved))
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "of another machine")
    assert compare(lambda folder: pytest.fail("measured again")) == rows


def test_an_arm_gets_the_learning_rate_with_the_lowest_kl_at_the_end_of_its_training(logged, tmp_path, monkeypatch):
    presets = importlib.import_module("presets")
    program, kl = experiment.program, {"0.0005": 3.0, "0.001": 1.0, "0.002": 2.0}

    def with_losses(script, *words):
        rate = next((word.partition("=")[2] for word in map(str, words) if "learning-rate=" in word), None)
        program(script, *words)
        if script == "distill.py":
            log = Path(words[-1]) / "log.jsonl"
            lines = [{"event": "train", "step": step, "tokens": step, "tokens_per_second": 1,
                      "loss_pred": 0 if step <= 8 else kl[rate]} for step in range(1, 11)]  # the end is the last fifth
            log.write_text("".join(json.dumps(line) + "\n" for line in [*EVALS, *lines]))

    monkeypatch.setattr(experiment, "program", with_losses)
    monkeypatch.setattr(presets, "finetuned", lambda model, data: {"stsb": [50.0]})
    monkeypatch.setattr(presets, "ARMS", {"plain": {}, "imitation": {"preset": "imitation"}})
    args = argparse.Namespace(corpus="text.txt", teacher="some/bert", data="glue", seeds=[0, 1])
    result = presets.measure(args)
    assert [command for command in logged if "--steps=1000" in command] == [
        command for command in logged if "--eval-every=250" in command and "--learning-rate=0.001" in command]
    assert [(row["arm"], row["seed"], row["stsb"]) for row in result["rows"]] == [
        (arm, seed, [50.0]) for arm in ("plain", "imitation") for seed in (0, 1)]
    assert [row["training_kl"] for row in result["other_rows"][:3]] == [3.0, 1.0, 2.0] and len(logged) == 2 * (3 + 2)


def test_fine_tuned_metrics_are_those_of_the_model_for_the_tasks_and_every_seed(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(experiment, "RUNS", tmp_path)
    monkeypatch.setattr(experiment, "program", lambda *words: commands.append(list(map(str, words))))
    for model in ("mine", "other"):
        for task, seed in (("rte", 0), ("rte", 1), ("cola", 0)):
            folder = tmp_path / "finetuned" / model / f"{task}-seed{seed}"
            folder.mkdir(parents=True)
            metrics = {"score": f"{model} {task} {seed}"}
            (folder / "result.json").write_text(json.dumps({"model": model, "task": task, "metrics": metrics}))
    scores = experiment.finetuned(Path("mine"), "glue", ["rte"], ["--seeds", 0, 1], lambda run: {"name": run.name})
    assert scores == {"rte": [{"score": f"mine rte {seed}", "name": f"rte-seed{seed}"} for seed in (0, 1)]}
    assert commands == [["finetune.py", "--model", "mine", "--task", "rte", "--data", "glue", "--output",
                         str(tmp_path / "finetuned"), "--seeds", "0", "1"]]


def test_the_origin_of_a_run_is_that_in_its_record(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join("the quick brown fox " * 100 for _ in range(20)))
    flags = ["--corpus", str(tmp_path / "text.txt"), "--output", str(tmp_path / "run"), "--cache-dir", str(tmp_path),
             "--steps", "1", "--batch-size", "1", "--eval-rows", "2", "--device", "cpu"]
    assert distill.main(flags) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    origin = experiment.origin(str(tmp_path / "text.txt"), experiment.BUNDLED)
    assert origin == {name: record[name] for name in ("teacher", "corpus")}


def test_the_curve_of_a_run_without_head_has_its_time(tmp_path):
    lines = [{"event": "train", "step": 4, "tokens": 400, "tokens_per_second": 100},
             {"event": "eval", "step": 4, "hidden_mse": 0.1}]
    assert experiment.curve(write_run(tmp_path / "run", lines)) == {"step": [4], "tokens": [400.0], "seconds": [4.0]}


def test_the_search_ranks_the_right_paragraph_by_cosine():
    pytest.importorskip("onnxruntime")
    minilm = importlib.import_module("minilm")
    search = object.__new__(minilm.Search)
    search.relevant = torch.tensor([0, 1, 2])
    paragraphs = torch.tensor([[1.0, 0.0], [0.0, 9.0], [3.0, 3.0]])
    questions = torch.tensor([[2.0, 0.0], [2.0, 1.0], [1.0, 0.0]])  # rank 1, rank 3 of 3, rank 2
    scores = search.scores(questions, paragraphs)
    assert scores == pytest.approx({"recall": 100 / 3, "mrr": 100 * (1 + 1 / 3 + 1 / 2) / 3})


def test_mteb_scores_are_those_of_every_encoder_in_percent(monkeypatch, capsys):
    mteb = pytest.importorskip("mteb", reason="needs mteb")
    mteb_scores, datasets = map(importlib.import_module, ("mteb_scores", "datasets"))
    texts = ["a cat", "one cat", "two dogs", "the market"]
    vectors = {"good": [[1, 0], [3, 1], [1, 1], [0, 1]], "bad": [[1, 0], [0, 1], [1, 1], [1, 0]]}

    class Encoder(mteb_scores.SentenceTransformer):
        def __init__(self, name):
            super().__init__(str(ROOT / "teachers" / "small"))
            self.table = dict(zip(texts, torch.tensor(vectors[name], dtype=torch.float32), strict=True))

        def encode(self, sentences, **options):
            return torch.stack([self.table[text] for text in sentences]).numpy()

    class Local(type(mteb.get_task("STSBenchmark"))):
        def load_data(self, **options):
            pairs = [{"sentence1": texts[0], "sentence2": text, "score": 5 - i} for i, text in enumerate(texts)]
            self.dataset, self.data_loaded = {"test": datasets.Dataset.from_list(pairs)}, True

    monkeypatch.setattr(mteb_scores, "SentenceTransformer", Encoder)
    monkeypatch.setattr(mteb, "get_tasks", lambda names: [Local()])
    monkeypatch.setattr(sys, "argv", ["mteb_scores.py", "good", "bad"])
    mteb_scores.main()
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "| task | good | bad |", "|---|---|---|", "| STSBenchmark | 100.0 | -10.5 |"]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["mteb_scores.py", "good", "--tasks", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        mteb_scores.main()


def test_switches_and_underscores_become_flags_and_an_unfinished_run_is_resumed(logged):
    folder = experiment.distil(align_heads=True, alpha_mlm=0, preset="imitation")
    assert {"--align-heads", "--alpha-mlm=0", "--preset=imitation"} < set(logged[0])
    (folder / "student").rmdir()
    (folder / "run.json").write_text("{}")
    assert experiment.distil(align_heads=True, alpha_mlm=0, preset="imitation") == folder
    assert logged[1] == ["--resume", "--output", str(folder)]


def test_the_deviation_is_that_of_a_sample():
    assert experiment.mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7**0.5))
    assert experiment.mean_and_deviation([5.0]) == (5.0, 0.0)


def test_a_result_records_its_command_without_folders_of_the_machine():
    argv = ["--corpus=/my data/wiki.txt.gz", "--data", "/glue/STS-B", "--teacher", "owner/model", "--seeds", "0"]
    assert experiment.header(argv)["command"].endswith(
        " --corpus=wiki.txt.gz --data STS-B --teacher owner/model --seeds 0")


def test_curves_and_dots_are_means_over_the_seeds():
    rows = [{"arm": "a, no masked-LM", "seed": seed, "step": [0, 1, 2], "kl": [0, 1 + seed, 2 + seed],
             "masked_lm_loss": [3, 4, 5]} for seed in (0, 1)]
    figure, (left, right) = experiment.panels("message", "details", 2, 3)
    experiment.plot_curves(left, rows)
    assert left.lines[0].get_xydata().tolist() == [[0, 0], [1, 1.5], [2, 2.5]] and left.lines[0].get_linestyle() == "--"
    experiment.plot_curves(left, rows, "masked_lm_loss")
    assert left.lines[1].get_ydata().tolist() == [3, 4, 5] and left.get_ylabel() == experiment.LABELS["masked_lm_loss"]
    experiment.plot_dots(right, rows, lambda row: row["kl"][-1], "KL")
    assert right.lines[0].get_xydata().tolist() == [[2.5, 0]] and right.texts[0].get_text() == "2.50"
    experiment.plt.close(figure)


def test_an_experiment_measures_saves_and_draws_and_with_draw_only_draws(monkeypatch, tmp_path):
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setattr(experiment, name, tmp_path / name)
        (tmp_path / name).mkdir()
    measured = []

    def measure(args):
        measured.append((args.seeds, args.corpus))
        return {"rows": [{"arm": "a", "kl": 2.0}]}

    def draw(result):
        figure, axis = experiment.panels("message", "details", 1, 3)
        experiment.plot_dots(axis, result["rows"], lambda row: row["kl"], "KL")
        return figure

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "toy.py"), *words])
        experiment.main("toy", "A toy.", measure, draw, corpus="a text")

    with pytest.raises(SystemExit):
        call()  # the corpus is missing
    call("--corpus", str(tmp_path / "text.txt"), "--seeds", "3", "4")
    assert measured == [([3, 4], str(tmp_path / "text.txt"))]
    result = json.loads((tmp_path / "RESULTS" / "toy.json").read_text())
    assert result["command"] == "python experiments/toy.py --corpus text.txt --seeds 3 4"  # without the folder
    assert result["rows"][0]["kl"] == 2.0 and result["versions"]["torch"]
    (tmp_path / "FIGURES" / "toy.png").unlink()
    call("--draw")
    assert len(measured) == 1 and (tmp_path / "FIGURES" / "toy.png").is_file()


# ---- The saved results ---------------------------------------------------------------------------------------

SAVED = sorted(path.stem for path in (ROOT / "experiments" / "results").glob("*.json"))


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_result_tells_its_origin_and_can_be_drawn(name):
    result = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())
    for row in itertools.chain(*(rows for key, rows in result.items() if key.endswith("rows"))):
        if "run" in row:  # `compare` reuses it only if BASE is the same
            assert result["base"] == experiment.BASE and {"commit", "machine", "teacher", "corpus"} <= set(row)
    assert {"command", "machine", "versions", "commit", "date"} <= set(result) and result["rows"]
    if name in ("sentences", "minilm", "widths"):
        pytest.importorskip("onnxruntime")
    figure = importlib.import_module(name).draw(result)
    assert all(axis.has_data() for axis in figure.axes)
    experiment.plt.close(figure)


@pytest.mark.parametrize("name", SAVED)
def test_a_picture_stands_in_the_documentation_and_is_at_most_1000_pixels_wide(name):
    data = (ROOT / "experiments" / "figures" / f"{name}.png").read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">I", data[16:20])[0] <= 2 * 1000  # at twice the resolution
    assert f"experiments/figures/{name}.png" in (ROOT / "docs" / "experiments.md").read_text()


def test_every_arm_of_an_experiment_has_valid_flags():
    from distill import parse_arguments

    schedules, losses, extensions, budget, third = map(
        importlib.import_module, ("schedules", "losses", "each_extension", "budget", "third"))
    arms = (schedules.HALF, schedules.QUARTER, losses.ARMS, extensions.ARMS, extensions.NO_MASKED_LM, budget.ARMS,
            *(arms | {"rate": rate} for rate, arms in third.RUNS.values()),
            {"ten times": budget.LONG})
    for flags in itertools.chain(*(each.values() for each in arms)):
        words = []
        for name, value in flags.items():
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        parsed = vars(parse_arguments(words))
        assert all(parsed[name] == value or parsed[name] in (["demo", value], [value]) for name, value in flags.items())
