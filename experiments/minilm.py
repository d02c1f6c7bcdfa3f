"""all-MiniLM-L6-v2 at half and a third of its width, and with every second layer, trained for the time that half takes.

Keeping some of the layers and imitating the teacher's sentence vectors is the common way; the examples of
sentence-transformers do it, too. The students are compared with the teacher on STS-B and in search: questions of
SQuAD, and the paragraph of each among PARAGRAPHS. No student is trained on these. Half the width and every second layer
get the best of three learning rates, with which the vectors of a short run agree best with the teacher's on held-out
sentences; a third of the width gets the rate of half.
"""

import json
import shutil
import time
from pathlib import Path

import experiment
import torch
import torch.nn.functional as F
from sentences import Judge, pooled_teacher
from speed import milliseconds_per_row

from distill import learning_rate
from model import Bert
from support.checkpoint import load_model, save_model
from support.distributed import tune_malloc
from support.evaluation import sentence_agreement
from support.files import write_atomically
from support.squad import read_squad

SEARCH = {"steps": 150, "batch_size": 16}
HALF, HALF_RATES = {"steps": 7324, "batch_size": 32}, (6e-4, 1.2e-3, 2.4e-3)
THIRD = {"steps": 750, "batch_size": 32, "target_width": 128}
LAYERS, LAYER_RATES = {"steps": 4750, "batch_size": 32}, (3e-4, 1e-3, 3e-3)  # about the time of HALF
PARAGRAPHS = 2000


def smaller_width(judge: Judge, args, rate: float, **flags) -> Path:
    """The student's folder. Its width is half the teacher's, unless given."""
    run = experiment.distil(**flags, learning_rate=rate, preset="compensated", eval_every=flags["steps"], eval_rows=64,
                            precision="bf16", teacher=args.teacher, corpus=args.corpus, seed=0)
    return run / "student"


def every_second_layer(judge: Judge, args, rate: float, steps: int, batch_size: int) -> Path:
    """The folder of the teacher's layers 2, 4, ..., trained on the mean squared error of the sentence vectors."""
    output = experiment.RUNS / f"every-second-layer_{rate}_{steps}_{batch_size}"
    checkpoint = output.with_name(f"{output.name}.pt")
    if output.is_dir():
        return output
    student: Bert = load_model(Path(args.teacher))
    student.bert.encoder["layer"] = student.bert.layers[1::2]
    student.config.num_hidden_layers = len(student.bert.layers)
    student.set_dropout(0.0)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.01, fused=True)
    first, seconds = 0, 0.0
    if checkpoint.is_file():
        weights, moments, first, seconds = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(weights)
        optimizer.load_state_dict(moments)

    tune_malloc()  # as distill.py does

    def vectors(bert: Bert, ids):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = bert(ids).hidden[-1]  # (B,S,D)
        return judge.encoder.after_pooling(judge.encoder.pool(hidden, torch.ones_like(ids)))

    start = time.time() - seconds
    for step in range(first, steps):
        ids = judge.rows.training_batch(0, step, batch_size).input_ids  # (B,S)
        with torch.no_grad():
            target = vectors(judge.teacher, ids)
        F.mse_loss(vectors(student, ids), target).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds = time.time() - start
            print(f"every second layer, step {step + 1} of {steps}, {seconds:.0f} s", flush=True)
            part = checkpoint.with_name(f"{checkpoint.name}.unfinished")
            torch.save((student.state_dict(), optimizer.state_dict(), step + 1, seconds), part)
            part.replace(checkpoint)
    work = shutil.copytree(args.teacher, output.with_name(f"{output.name}.unfinished"), dirs_exist_ok=True)
    save_model(student, work)
    (work / "seconds.txt").write_text(f"{time.time() - start:.0f}\n")
    checkpoint.unlink(missing_ok=True)
    return work.rename(output)


class Search:
    """The first PARAGRAPHS paragraphs of a SQuAD file with their questions."""

    def __init__(self, path: Path, judge: Judge):
        pairs = [example.texts for example in read_squad(path, "squad")]
        paragraphs = list(dict.fromkeys(paragraph for _, paragraph in pairs))[:PARAGRAPHS]
        number = {paragraph: i for i, paragraph in enumerate(paragraphs)}
        pairs = [pair for pair in pairs if pair[1] in number]
        self.relevant = torch.tensor([number[paragraph] for _, paragraph in pairs])  # (Q,)
        self.questions, self.paragraphs = judge.tokens([question for question, _ in pairs]), judge.tokens(paragraphs)

    def scores(self, questions, paragraphs) -> dict[str, float]:
        """Recall at 1 and MRR at 10, in percent, from vectors of questions (Q,E) and of paragraphs (P,E)."""
        found = F.normalize(questions, dim=1) @ F.normalize(paragraphs, dim=1).T  # (Q,P) cosines
        rank = 1 + (found > found.gather(1, self.relevant[:, None])).sum(1)  # (Q,) of the right paragraph
        return {"recall": 100 * (rank == 1).double().mean().item(),
                "mrr": 100 * torch.where(rank <= 10, 1 / rank, 0.0).mean().item()}


def best_rate(judge: Judge, student, args, rates) -> tuple[float, dict[float, float]]:
    """The rate with which short runs agree best with the teacher on held-out sentences, and all agreements."""
    agreements = {}
    for rate in rates:
        own = judge.vectors(student(judge, args, rate, **SEARCH))["own"]
        agreements[rate] = sentence_agreement(own(judge.heldout), judge.expected)["sentence_spearman"]
    return max(agreements, key=agreements.get), agreements


def measure(args) -> dict:
    judge = Judge(Path(args.teacher), args)
    search = Search(Path(args.squad), judge)
    rates, agreements = zip(best_rate(judge, smaller_width, args, HALF_RATES),
                            best_rate(judge, every_second_layer, args, LAYER_RATES), strict=True)
    models = {"teacher": pooled_teacher(Path(args.teacher), "mean"),
              "half the width": smaller_width(judge, args, rates[0], **HALF),
              "a third of the width": smaller_width(judge, args, rates[0], **THIRD),
              "every second layer": every_second_layer(judge, args, rates[1], **LAYERS)}
    rows = []
    for arm, folder in models.items():
        scores = folder / "scores.json"  # kept, because judging takes minutes; delete them for other data
        if not scores.is_file():
            index = judge.encoder.vectors(judge.teacher, search.paragraphs)  # of the teacher
            functions = judge.vectors(folder)
            row = judge(folder, functions)
            for name, vectors in functions.items():
                questions = vectors(search.questions)
                row |= {f"{key}_{name}": value for key, value in search.scores(
                    questions, vectors(search.paragraphs)).items()}
                if questions.shape[1] == index.shape[1]:
                    row |= {f"{key}_{name}_in_teacher_index": value
                            for key, value in search.scores(questions, index).items()}
            write_atomically(scores, json.dumps(row))
        rows.append({"arm": arm} | json.loads(scores.read_text()))
        print(rows[-1], flush=True)
    times = milliseconds_per_row(models)
    seconds = [experiment.curve(models["half the width"].parent)["seconds"][-1],
               float((models["every second layer"] / "seconds.txt").read_text())]
    return {"rates": rates, "agreements": agreements, "questions": len(search.questions), "seconds": seconds,
            "half": HALF, "third": THIRD, "layers": LAYERS, "rows": [row | times[row["arm"]] for row in rows]}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Less width or fewer layers: quality and speed",
        "all-MiniLM-L6-v2; trained with {}, {} and {} million tokens of Wikipedia; float32, own vectors; ".format(
            *(round(result[arm]["steps"] * result[arm]["batch_size"] * 128 / 1e6, 1) for arm in (
                "half", "third", "layers"))) + f"{result['threads']} threads", 2, 3.8, sharex=True)
    colours = {"teacher": experiment.GREY, "every second layer": experiment.OTHER}
    for axis, key, label in zip(axes, ("stsb", "recall"), ("STS-B dev, Spearman (percent)",
                                                         "search, recall at 1 (percent)"), strict=True):
        for row in result["rows"]:
            colour = colours.get(row["arm"], experiment.OURS)
            point = row["onnxruntime float32"][1], row[f"{key}_own"]
            axis.plot(*point, "o", color=colour)
            place, side = ((-7, -4), "right") if row["arm"] == "half the width" else ((7, -4), "left")
            axis.annotate(row["arm"], point, place, textcoords="offset points", ha=side, color=colour)
        axis.set(xlabel="milliseconds per row of 128 tokens in onnxruntime", ylabel=label)
        axis.margins(x=0.3, y=0.2)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    experiment.main("minilm", __doc__, measure, draw, teacher="Folder of all-MiniLM-L6-v2.", corpus="Text to train on.",
                    data="Folder of STS-B.", squad="Training part of SQuAD 1.1.")
