"""Width against quality and cost: three quarters, half, a third and a quarter of the teacher's width.

KL, top-1 accuracy, SST-2, size, and milliseconds per row in `transformers` and, exported, in onnxruntime. The times are
medians over batches of 16 x 128 tokens without a masked-LM head, the models in alternation.
"""

import statistics
import time
from pathlib import Path

import experiment
import export_onnx
import onnxruntime
import torch
import transformers

from support.checkpoint import load_model

WIDTHS = (192, 128, 88, 64)
BUDGET = {"steps": 200, "eval_every": 25, "eval_rows": 1024}
STEPS = 150  # of fine-tuning
REPEATS = 9
LIBRARIES = ("transformers", "onnxruntime")


def milliseconds_per_row(models: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Model -> library -> milliseconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    inputs = export_onnx.example(8000, 16, 128)
    tensors = dict(zip(export_onnx.INPUTS, inputs, strict=True)) | {"attention_mask": torch.ones_like(inputs[1])}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    calls, times = {}, {}
    for arm, folder in models.items():
        path = experiment.RUNS / "student.onnx"
        student = export_onnx.Student(folder)
        student.bert.cls = None  # onnxruntime computes the logits even if nobody asks for them
        export_onnx.export(student, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        calls[arm, "transformers"] = lambda bert=bert: bert(**tensors)
        calls[arm, "onnxruntime"] = lambda session=session: session.run(["last_hidden_state"], arrays)
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                times.setdefault(key, []).append((time.perf_counter() - start) * 1000 / 16)
    return {arm: {library: statistics.median(times[arm, library][1:]) for library in LIBRARIES} for arm in models}


def measure(args) -> dict:
    teacher = experiment.ROOT / "teachers" / "small"
    runs = {str(width): experiment.distil(seed=0, target_width=width, **BUDGET) for width in WIDTHS}
    models = {"256, teacher": teacher} | {width: run / "student" for width, run in runs.items()}
    scores = experiment.rows_of(experiment.finetuned(models, args.data, ["sst2"], args.seeds, STEPS))
    times = milliseconds_per_row(models)
    rows = []
    for arm, folder in models.items():
        last = experiment.events(runs.get(arm, runs["128"]), "eval")[-1]
        mean, deviation = experiment.mean_and_deviation([row["score"] for row in scores[arm]])
        rows.append({
            "arm": arm, "kl": 0.0 if folder == teacher else last["kl"],
            "top1": last["teacher_top1" if folder == teacher else "top1"], "sst2": mean, "sst2_spread": deviation,
            "megabytes": 4e-6 * load_model(folder).parameter_count(), **times[arm]})
    return {"rows": rows, "steps": STEPS}


def draw(result: dict):
    figure, (quality, task, cost) = experiment.panels(
        "Half the width takes about half the time; much narrower students lose far more quality",
        f"bundled teacher (256), 200 steps of 8 x 128 tokens, one seed; SST-2 after {result['steps']} steps, mean and "
        f"standard deviation over the seeds; {result['threads']} threads", 3, 3.7)
    rows, blue = result["rows"], experiment.PAPER
    widths = [int(row["arm"].split(",")[0]) for row in rows]
    quality.plot(widths, [row["kl"] for row in rows], "o-", color=blue)
    task.errorbar(widths, [row["sst2"] for row in rows], [row["sst2_spread"] for row in rows], fmt="o-", capsize=3,
                  color=blue)
    for library, colour, height in zip(LIBRARIES, (blue, experiment.GREY), (6, 2.7), strict=True):
        cost.plot(widths, [row[library] for row in rows], "o-", color=colour)
        cost.text(160, height, library, color=colour, ha="center")
    cost.set_ylim(bottom=0)
    for axis, label in ((quality, experiment.LABELS["kl"]), (task, "SST-2, accuracy (percent)"),
                        (cost, "milliseconds per row")):
        axis.set(xlabel="hidden size", ylabel=label, xticks=widths)
        axis.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    experiment.main("widths", __doc__, measure, draw, data="folder of GLUE")
