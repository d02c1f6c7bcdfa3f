"""Width against quality and speed: a language model at 3/4, 1/2, 1/3 and 1/4 of its width, fine-tuned, and timed.

The fine-tuned models are judged in float32 and in int8, with the encoder in onnxruntime.
"""

from pathlib import Path

import experiment
import onnxruntime
import torch
import torch.nn.functional as F
from speed import milliseconds_per_row, onnx_files, run
from torch import nn

import finetune
from support.checkpoint import load_config, load_model, load_tokenizer, read_tensors
from support.files import read_json
from support.glue import TASKS, encode, find_data, read_task

WIDTHS = {"3/4": 288, "1/2": 192, "1/3": 128, "1/4": 96}
FLAGS = {"preset": "imitation", "learning_rate": 1e-3, "steps": 3000, "eval_every": 500, "precision": "bf16", "seed": 0}
FINETUNE = ["--precision", "bf16"]
SEEDS = {"stsb": [0, 1, 2], "sst2": [0]}  # of the fine-tuning
METRICS = {"stsb": ("spearman", "STS-B dev, Spearman (percent)"), "sst2": ("accuracy", "SST-2 dev, accuracy (percent)")}
LIBRARIES = {"transformers": ("#707070", "float32"), "onnxruntime float32": ("#009E73", "float32"),
             "onnxruntime int8": ("#CC6677", "int8")}  # colour and precision


class InOnnxruntime(nn.Module):
    """A fine-tuned model for `finetune.evaluate`: its encoder in onnxruntime, in "float32" or "int8"."""

    def __init__(self, folder: Path, task: str, precision: str):
        super().__init__()
        self.bert, self.kind = load_model(folder).eval(), TASKS[task].kind
        self.config = self.bert.config
        self.session = onnxruntime.InferenceSession(onnx_files(folder)[precision], providers=["CPUExecutionProvider"])
        tensors = read_tensors(folder)
        self.head = tensors["classifier.weight"], tensors["classifier.bias"]

    def forward(self, input_ids, token_type_ids, attention_mask):
        hidden = run(self.session, "last_hidden_state", input_ids, attention_mask, token_type_ids)  # (B,S,D)
        return F.linear(self.bert.pooled(hidden), *self.head)  # (B,C)


def finetuned(model: Path, task: str, data: str) -> list[dict]:
    """For every seed the metrics on dev: as finetune.py measured them and, by name, in "float32" and in "int8"."""
    examples = read_task(task, find_data(data, [task], skip_missing=False)[task])["dev"]

    def in_onnxruntime(folder: Path) -> dict:
        job = finetune.Job(**{name: value for name, value in read_json(folder / "result.json").items()
                              if name in finetune.Job.__dataclass_fields__} | {"bf16": False})
        rows = {"dev": encode(examples, load_tokenizer(folder, load_config(folder).vocab_size), job.max_length)}
        return {precision: finetune.evaluate(InOnnxruntime(folder, task, precision), rows, job, torch.device("cpu"))
                for precision in ("float32", "int8")}

    return experiment.finetuned(model, data, [task], [*FINETUNE, "--seeds", *SEEDS[task]], more=in_onnxruntime)[task]


def measure(args) -> dict:
    models = {"teacher": Path(args.teacher)} | {
        arm: experiment.distil(**FLAGS, target_width=width, teacher=args.teacher, corpus=args.corpus) / "student"
        for arm, width in WIDTHS.items()}
    rows = []
    for arm, folder in models.items():
        megabytes = {name: path.stat().st_size / 1e6 for name, path in onnx_files(folder).items()}
        own = experiment.summary(folder.parent) if arm in WIDTHS else {}
        rows.append({"arm": arm, "megabytes": megabytes} | own | {
            task: finetuned(folder, task, args.data) for task in SEEDS})
    times = milliseconds_per_row(models)
    return {"flags": FLAGS, "finetuning": FINETUNE, "rows": [row | times[row["arm"]] for row in rows]}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Narrower students are faster; after 5 epochs of fine-tuning, STS-B falls below half the width",
        "6 × 384, 3,000 steps of 8 x 128 tokens of Wikipedia, preset imitation; fine-tuned with "
        f"{len(SEEDS['stsb'])} seeds (STS-B, ± standard deviation) and one (SST-2); {result['threads']} threads",
        2, 4.2)
    for axis, (task, (metric, label)) in zip(axes, METRICS.items(), strict=True):
        for library, (colour, precision) in LIBRARIES.items():
            medians = [row[library][1] for row in result["rows"]]
            means, deviations = zip(*(experiment.mean_and_deviation([each[precision][metric] for each in row[task]])
                                      for row in result["rows"]), strict=True)
            axis.errorbar(medians, means, deviations, marker="o", color=colour, label=library, capsize=3)
            if library == "transformers":  # the slowest: to its right there is room
                for row, *point in zip(result["rows"], medians, means, strict=True):
                    axis.annotate(row["arm"], point, (7, -5), textcoords="offset points", fontsize="small")
        axis.set(xlabel="milliseconds per row of 128 tokens", ylabel=label)
        axis.margins(0.2, 0.1)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    experiment.main("widths", __doc__, measure, draw, teacher="Folder of the teacher.", corpus="Text to train on.",
                    data="Folder of GLUE.")
