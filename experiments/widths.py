"""Width against quality: 3/4, 1/2, 1/3 and 1/4 of the teacher's width.

KL, top-1, SST-2, milliseconds a sequence in `transformers` and, exported, in onnxruntime, and megabytes. The times are
medians of batches of 16 x 128 tokens without a masked-LM head, on as many threads as torch has, models in alternation.
"""

import statistics
import time

import experiment
import export_onnx
import onnxruntime
import torch
import transformers
from experiment import plt

import model

WIDTHS = (192, 128, 88, 64)
STEPS = 150
REPEATS = 9


def milliseconds(models: dict[str, experiment.Path]) -> dict[str, dict[str, float]]:
    """Model -> library -> milliseconds a sequence."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    inputs = export_onnx.example(8000, 16, 128)
    named = dict(zip(export_onnx.INPUTS, inputs, strict=True))
    named["attention_mask"] = torch.ones_like(inputs[1])
    arrays = {name: tensor.numpy() for name, tensor in named.items()}
    calls, seen = {}, {}
    for arm, folder in models.items():
        path = experiment.RUNS / "student.onnx"
        export_onnx.export(folder, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        calls[arm, "transformers"] = lambda bert=bert: bert(**named)
        calls[arm, "onnxruntime"] = lambda session=session: session.run(["last_hidden_state"], arrays)
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                seen.setdefault(key, []).append((time.perf_counter() - start) * 1000 / 16)
    return {arm: {library: statistics.median(seen[arm, library][1:]) for library in ("transformers", "onnxruntime")}
            for arm in models}


def measure(args) -> dict:
    teacher = experiment.ROOT / "teachers" / "small"
    runs = {str(width): experiment.distil(seed=0, **({} if width == 128 else {"target_width": width}))
            for width in WIDTHS}
    models = {"256, teacher": teacher} | {width: run / "student" for width, run in runs.items()}
    scores = experiment.rows_of(experiment.finetuned(models, args.data, ["sst2"], args.seeds, STEPS))
    times = milliseconds(models)
    rows = []
    for arm, folder in models.items():
        last = experiment.events(runs.get(arm, runs["128"]), "eval")[-1]
        mean, spread = experiment.mean_and_spread([row["score"] for row in scores[arm]])
        rows.append({
            "arm": arm, "kl": 0.0 if folder == teacher else last["kl"],
            "top1": last["teacher_top1" if folder == teacher else "top1"], "sst2": mean, "sst2_spread": spread,
            "megabytes": 4e-6 * model.load_model(folder).parameter_count(), **times[arm]})
    return {"rows": rows, "steps": STEPS}


def draw(result: dict):
    panels = {"kl": "KL to the teacher, nats", "top1": "masked top-1", "sst2": "SST-2 accuracy, percent",
              "transformers": "milliseconds a sequence", "megabytes": "megabytes in float32"}
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.6), layout="constrained")
    rows = result["rows"]
    widths = [int(row["arm"].split(",")[0]) for row in rows]
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        spread = [row["sst2_spread"] for row in rows] if key == "sst2" else None
        axis.errorbar(widths, [row[key] for row in rows], yerr=spread, fmt="o-", capsize=3, label=key)
        if key == "transformers":
            axis.plot(widths, [row["onnxruntime"] for row in rows], "s-", label="onnxruntime")
            axis.legend()
        axis.set_xticks(widths)
        axis.set_xlabel("hidden width")
        axis.set_title(label, fontsize="medium")
        axis.grid(alpha=0.3)
    figure.suptitle(f"Bundled teacher, {experiment.BUDGET}, one seed; SST-2 after {result['steps']} steps, "
                    f"{result['threads']} thread(s)")
    return figure


if __name__ == "__main__":
    experiment.main("widths", __doc__, measure, draw, ("--data", {"help": "folder of GLUE"}))
