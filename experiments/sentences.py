"""Shrink a sentence encoder, all-MiniLM-L6-v2, to half its width: with its mean pooling, and as a CLS-pooled teacher.

Teachers and students are compared on the dev split of STS-B (Spearman correlation of labels and cosines), with their
own vectors, with these mapped into the teacher's space as by --keep-space, and in int8; and on held-out sentences with
the teacher's vectors. No student is trained on a pair.
"""

import json
import shutil
from pathlib import Path

import experiment
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from speed import onnx_files, run

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
        self.tokenizer = load_tokenizer(folder, self.teacher.config.vocab_size)
        cache = next(Path(flag.default).expanduser() for flag in DATA_FLAGS if flag.name == "--cache-dir")
        self.rows, heldout, _ = data.load_rows([args.corpus], self.tokenizer, cache, 128, masked=False)
        self.fit, self.heldout = (sentences_of(part, count, self.tokenizer) for part, count in (
            (self.rows, FIT_SENTENCES), (heldout, HELDOUT_SENTENCES)))
        self.tokenizer.enable_truncation(self.encoder.max_length)
        pairs = read_task("stsb", Path(args.data))["dev"]
        self.labels = np.array([pair.label for pair in pairs])
        self.pairs = [self.tokens(texts) for texts in zip(*(pair.texts for pair in pairs), strict=True)]
        self.expected = self.encoder.vectors(self.teacher, self.heldout)

    def tokens(self, texts) -> list[np.ndarray]:
        """The token ids of every text, with [CLS] and [SEP], cut to the teacher's maximum length."""
        return [np.array(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]

    @torch.no_grad()
    def vectors(self, folder: Path) -> dict:
        """The functions from sentences, which are arrays of token ids, to vectors (N,E), by name in VARIANTS."""
        bert = load_model(folder).eval()
        own = SentenceEncoder.read(folder, bert.config)
        kept = self.encoder.fitted(bert, self.teacher, self.fit)

        def int8(sentences):
            session = onnxruntime.InferenceSession(onnx_files(folder)["int8"], providers=["CPUExecutionProvider"])
            return torch.cat([run(session, "sentence_embedding", ids[None], np.ones_like(ids)[None],
                                  np.zeros_like(ids)[None]) for ids in sentences])  # one by one, without padding

        return {"own": lambda sentences: own.vectors(bert, sentences),
                "kept": lambda sentences: kept.vectors(bert, sentences), "int8": int8}

    def __call__(self, folder: Path, vectors: dict) -> dict:
        """The figures of the checkpoint in `folder`, which has these `vectors`."""
        result = {}
        for name, function in vectors.items():
            first, second = map(function, self.pairs)
            result[f"stsb_{name}"] = 100 * spearman(F.cosine_similarity(first, second).numpy(), self.labels)
        for name in ("own", "kept"):
            agreement = sentence_agreement(vectors[name](self.heldout), self.expected)
            result |= {f"{name}_{key}": value for key, value in agreement.items()}
        sizes = {"megabytes": folder / "model.safetensors", "megabytes_int8": onnx_files(folder)["int8"]}
        return result | {name: file.stat().st_size / 1e6 for name, file in sizes.items()}


def measure(args) -> dict:
    rows = []
    for pooling in ("mean", "cls"):
        teacher = pooled_teacher(Path(args.teacher), pooling)
        judge = Judge(teacher, args)
        rows.append({"pooling": pooling, "arm": "teacher", "seed": 0, **judge(teacher, judge.vectors(teacher))})
        for arm, flags in ARMS.items():
            for seed in args.seeds:
                run = experiment.distil(**flags, **BUDGET, teacher=teacher, corpus=args.corpus, seed=seed)
                folder = run / "student"
                rows.append({"pooling": pooling, "arm": arm, "seed": seed, **judge(folder, judge.vectors(folder))})
                print(json.dumps(rows[-1]), flush=True)
    return {"budget": BUDGET, "pairs": len(judge.labels), "rows": rows}


def draw(result: dict):
    budget = result["budget"]
    figure, axes = experiment.panels(
        "L_pool does not help on STS-B",
        f"all-MiniLM-L6-v2 384 → 192, {budget['steps']} steps of {budget['batch_size']} x 128 tokens of Wikipedia; "
        + experiment.over_seeds(result["rows"], "standard deviation"), 2, 3.6, sharex=True, sharey=True)
    for axis, pooling in zip(axes, ("mean", "cls"), strict=True):
        rows = [row for row in result["rows"] if row["pooling"] == pooling]
        dots = [{"arm": f"{row['arm']}, {text}" if row["arm"] != "teacher" else "teacher", "score": row[f"stsb_{name}"]}
                for name, text in VARIANTS.items() for row in rows if row["arm"] != "teacher" or name == "own"]
        experiment.COLOURS |= {dot["arm"]: experiment.OURS for dot in dots if dot["arm"].startswith("with L_pool")}
        experiment.plot_dots(axis, dots, lambda row: row["score"], "STS-B dev, Spearman")
        axis.set_title(f"{pooling.replace('cls', 'CLS')} pooling")
    return figure


if __name__ == "__main__":
    experiment.main("sentences", __doc__, measure, draw, teacher="Folder of all-MiniLM-L6-v2.",
                    corpus="Text to train on.", data="Folder of STS-B.")
