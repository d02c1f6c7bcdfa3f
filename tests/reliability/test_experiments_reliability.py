"""Experiments with real runs of distill.py, and the export for onnxruntime."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from made_up_tasks import write_glue

from support.checkpoint import load_model, save_model

sys.path.insert(0, str(ROOT / "experiments"))

import experiment  # noqa: E402


def test_a_run_is_made_once_and_an_interrupted_one_is_resumed(checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiment, "BASE", {
        "corpus": str(corpus), "cache_dir": tmp_path / "cache", "steps": 4, "batch-size": 4, "seq-length": 16,
        "eval-every": 1, "log-every": 2, "device": "cpu"})
    commands, program = [], experiment.program
    monkeypatch.setattr(experiment, "program", lambda *words: (commands.append(words), program(*words)))
    arms = {"plain": {}, "random": {"init": "random"}, "again": {}}
    plain, random, again = experiment.compare(arms, [0], str(corpus), checkpoint)
    assert len(commands) == 2
    assert plain["kl"] == again["kl"] != random["kl"] and random["kl"][0] > plain["kl"][0] == 0
    assert plain["step"] == [0, 1, 2, 3, 4] and plain["tokens"] == [step * 4 * 16 for step in range(5)]
    folder = experiment.distil(seed=0, teacher=checkpoint)
    weights = (folder / "student" / "model.safetensors").read_bytes()
    (folder / "student").rename(tmp_path / "student")
    experiment.distil(seed=0, teacher=checkpoint)
    assert "--resume" in commands[-1] and (folder / "student" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("head", [True, False])
def test_an_exported_student_computes_the_same_in_onnxruntime(checkpoint, tmp_path, head, capsys):
    export_onnx = pytest.importorskip("export_onnx")
    bert = load_model(checkpoint).eval()
    if not head:
        bert.cls = None
    (tmp_path / "student").mkdir()
    save_model(bert, tmp_path / "student")
    path = tmp_path / "student.onnx"
    assert export_onnx.main([str(tmp_path / "student"), str(path)]) == 0
    assert "largest difference" in capsys.readouterr().out
    session = export_onnx.onnxruntime.InferenceSession(path)
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "logits"][:2 if head else 1]
    inputs = export_onnx.example(bert.config, 5, 11)
    hidden = session.run(None, {k: v.numpy() for k, v in zip(export_onnx.INPUTS, inputs, strict=True)})[0]
    with torch.no_grad():
        ours = bert(inputs[0], None, inputs[2], inputs[1]).hidden[-1].numpy()
    np.testing.assert_allclose(hidden[0], ours[0], atol=1e-4)  # the row without padding
    assert export_onnx.main([str(tmp_path / "missing"), str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fine_tuned_model_predicts_the_same_in_onnxruntime_and_nearly_in_int8(checkpoint, tmp_path, monkeypatch):
    widths = pytest.importorskip("widths")
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(widths, "FINETUNE", ["--learning-rate", 1e-3, "--epochs", 6, "--batch-size", 8,
                                            "--precision", "fp32"])
    monkeypatch.setattr(widths, "SEEDS", {"stsb": [3]})
    metrics, = widths.finetuned(checkpoint, "stsb", str(write_glue("stsb", tmp_path / "STS-B", train=64, dev=40)))
    assert metrics["pearson"] > 50 and metrics["float32"]["pearson"] == pytest.approx(metrics["pearson"], abs=1e-3)
    assert 1e-2 < abs(metrics["int8"]["pearson"] - metrics["pearson"]) < 5
