"""Shrink a sentence encoder, all-MiniLM-L6-v2, to half its width: with its mean pooling, and as a CLS-pooled teacher.

Teachers and students are compared on the dev split of STS-B (Spearman correlation of labels and cosines), with their
own vectors, with these mapped into the teacher's space as by --keep-space, and in int8; and on held-out sentences with
the teacher's vectors. No student is trained on a pair.
"""

import json
import shutil
from pathlib import Path

import experiment
import export_onnx
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F

import data
from support.checkpoint import load_config, load_model, load_tokenizer
from support.evaluation import sentence_agreement
from support.flags import DATA_FLAGS
from support.glue import read_task
from support.metrics import spearman
from support.sentence_encoder import POOLING, SentenceEncoder, sentences_of

ARMS = {"with L_pool": {}, "without L_pool": {"alpha_pool": 0}}
BUDGET = {"steps": 60, "batch_size": 16, "learning_rate": 6e-4, "preset": "compensated", "eval_every": 60,
          "eval_rows": 64}
FIT_SENTENCES, HELDOUT_SENTENCES = 2048, 1000
VARIANTS = {"own": "own vectors", "kept": "in the teacher's space", "int8": "own vectors, int8"}


def pooled_teacher(folder: Path, pooling: str) -> Path:
    """A copy of the sentence encoder in `folder` with "cls" or "mean" pooling."""
    copy = shutil.copytree(folder, experiment.RUNS / f"teacher-{pooling}", dirs_exist_ok=True)
    config = {"word_embedding_dimension": load_config(folder).hidden_size, POOLING[pooling]: True}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return copy


class Judge:
    """Compares checkpoints with a teacher on STS-B and on held-out sentences."""

    def __init__(self, folder: Path, args):
        self.teacher = load_model(folder).eval()
        self.encoder = SentenceEncoder.read(folder, self.teacher.config)
        tokenizer = load_tokenizer(folder, self.teacher.config.vocab_size)
        cache = next(Path(flag.default) for flag in DATA_FLAGS if flag.name == "--cache-dir")
        rows, heldout, _ = data.load_rows([args.corpus], tokenizer, cache, 128)
        self.fit, self.heldout = (sentences_of(part, count, tokenizer) for part, count in (
            (rows, FIT_SENTENCES), (heldout, HELDOUT_SENTENCES)))
        self.pairs = read_task("stsb", Path(args.data))["dev"]
        self.texts = [[np.array(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
                      for texts in zip(*(pair.texts for pair in self.pairs), strict=True)]
        self.expected = self.encoder.vectors(self.teacher, self.heldout)

    def score(self, vectors) -> float:
        """Spearman in percent. vectors: a function from sentences, which are arrays of token ids, to (N,E)."""
        first, second = map(vectors, self.texts)
        labels = np.array([pair.label for pair in self.pairs])
        return 100 * spearman(F.cosine_similarity(first, second).numpy(), labels)

    @torch.no_grad()
    def __call__(self, folder: Path) -> dict:
        bert = load_model(folder).eval()
        own = SentenceEncoder.read(folder, bert.config)
        kept = self.encoder.fitted(bert, self.teacher, self.fit)
        path = experiment.RUNS / "student.onnx"
        export_onnx.export(export_onnx.Student(folder), path)
        export_onnx.quantize(path, path.with_suffix(".int8.onnx"))
        session = onnxruntime.InferenceSession(path.with_suffix(".int8.onnx"), providers=["CPUExecutionProvider"])

        def int8(sentences):
            parts = []
            for ids in sentences:  # one by one, without padding
                inputs = zip(export_onnx.INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True)
                feeds = {name: values[None].astype(np.int64) for name, values in inputs}
                parts.append(torch.from_numpy(session.run(["sentence_embedding"], feeds)[0]))
            return torch.cat(parts)

        sizes = {name: file.stat().st_size / 1e6 for name, file in (
            ("megabytes", folder / "model.safetensors"), ("megabytes_int8", path.with_suffix(".int8.onnx")))}
        vectors = {"own": lambda sentences: own.vectors(bert, sentences),
                   "kept": lambda sentences: kept.vectors(bert, sentences), "int8": int8}
        return sizes | {f"stsb_{name}": self.score(function) for name, function in vectors.items()} | {
            f"{name}_{key}": value for name in ("own", "kept")
            for key, value in sentence_agreement(vectors[name](self.heldout), self.expected).items()}


def measure(args) -> dict:
    rows = []
    for pooling in ("mean", "cls"):
        teacher = pooled_teacher(Path(args.teacher), pooling)
        judge = Judge(teacher, args)
        rows.append({"pooling": pooling, "arm": "teacher", "seed": 0, **judge(teacher)})
        for arm, flags in ARMS.items():
            for seed in args.seeds:
                folder = experiment.distil(**flags, **BUDGET, teacher=teacher, corpus=args.corpus, seed=seed)
                rows.append({"pooling": pooling, "arm": arm, "seed": seed, **judge(folder / "student")})
                print(json.dumps(rows[-1]), flush=True)
    return {"budget": BUDGET, "pairs": len(judge.pairs), "rows": rows}


def draw(result: dict):
    budget = result["budget"]
    figure, axes = experiment.panels(
        f"Half the width, after {budget['steps'] * budget['batch_size'] * 128 / 1e6:.2f} million tokens",
        f"all-MiniLM-L6-v2 384 → 192, {budget['steps']} steps of {budget['batch_size']} x 128 tokens of Wikipedia; "
        f"{len({row['seed'] for row in result['rows'] if row['arm'] != 'teacher'})} seeds",
        2, 3.6, sharex=True, sharey=True)
    for axis, pooling in zip(axes, ("mean", "cls"), strict=True):
        rows = [row for row in result["rows"] if row["pooling"] == pooling]
        dots = [{"arm": f"{row['arm']}, {text}" if row["arm"] != "teacher" else "teacher", "score": row[f"stsb_{name}"]}
                for name, text in VARIANTS.items() for row in rows if row["arm"] != "teacher" or name == "own"]
        experiment.COLOURS |= {dot["arm"]: experiment.OURS for dot in dots if dot["arm"].startswith("with L_pool")}
        experiment.plot_dots(axis, dots, lambda row: row["score"], "STS-B dev, Spearman")
        axis.set_title(f"{pooling.replace('cls', 'CLS')} pooling")
    return figure


if __name__ == "__main__":
    experiment.main("sentences", __doc__, measure, draw, teacher="folder of all-MiniLM-L6-v2",
                    corpus="text to train on", data="folder of STS-B")
