"""Small made-up GLUE and SQuAD tasks in their original file formats."""

import json
import random
from pathlib import Path

from conftest import WORDS

from support.glue import split_names

ANSWERS = WORDS[-3:]  # the answers to the questions; no other text contains these words
MNLI = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1")
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
# Task -> header, row, labels ordered by class, then header and row of the test split.
ORIGINAL = {
    "cola": ("", "gj04\t{label}\t*\t{a}", ["0", "1"], "index\tsentence", "{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}", ["0", "1"], "index\tsentence", "{a}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{a}\t{b}", ["0", "1"],
             "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t2\t{a}\t{b}"),
    "stsb": (f"{STSB}\tscore", "0\tg\tf\t2012\t0\tn\tn\t{a}\t{b}\t{label}", ["1.250", "4.5"], STSB,
             "g\tf\t2012\t0\tn\tn\t{a}\t{b}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\t{a}\t{b}\t{label}", ["0", "1"],
            "id\tquestion1\tquestion2", "{a}\t{b}"),
    "mnli": (f"{MNLI}\tgold_label", "0\t1\t2\tg\tp\tp\tp\tp\t{a}\t{b}\tneutral\t{label}",
             ["entailment", "neutral", "contradiction"], MNLI.removesuffix("\tlabel1"),
             "1\t2\tg\tp\tp\tp\tp\t{a}\t{b}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}", ["entailment", "not_entailment"],
             "index\tquestion\tsentence", "{a}\t{b}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}", ["entailment", "not_entailment"],
            "index\tsentence1\tsentence2", "{a}\t{b}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}", ["0", "1"],
             "index\tsentence1\tsentence2", "{a}\t{b}"),
}
# Class names ordered as in nyu-mll/glue on the hub
LABELS = {
    "cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"], "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"], "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}


def random_text(generator: random.Random, low=3, high=9) -> str:
    return " ".join(generator.choices(WORDS[:-3], k=generator.randint(low, high)))


def write_glue(key: str, folder: Path, train=24, dev=10, test=True) -> Path:
    """A task whose label depends on the first word, so that a model can learn it. Returns `folder`."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    header, row, labels, test_header, test_row = ORIGINAL[key]
    for split in split_names(key):
        is_test = split.startswith("test")
        lines = [test_header] if is_test else [header] if header else []
        for i in range({"tr": train, "de": dev, "te": 5}[split[:2]]):
            label = i % len(labels)
            a = f"{WORDS[label]} {WORDS[label]} {random_text(generator)}"
            values = dict(a=a, b=random_text(generator), label=labels[label])
            lines.append(f"{i}\t{test_row.format(**values)}" if is_test else row.format(**values))
        if test or not is_test:
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_squad(folder: Path, version="v1.1", paragraphs=6) -> Path:
    """Questions answered by the one word of ANSWERS in the paragraph. In 2.0 every second question has no answer."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for split in ("train", "dev"):
        made = []
        for i in range(paragraphs):
            answer, unanswerable = generator.choice(ANSWERS), version == "v2.0" and i % 2 == 1
            before = random_text(generator) + " "
            context = before + ("" if unanswerable else answer + " ") + random_text(generator)
            answers = [] if unanswerable else [{"text": answer, "answer_start": len(before)}]
            question = {"id": f"{split}{i}", "question": random_text(generator), "answers": answers}
            made.append({"context": context, "qas": [question]})
        root = {"version": version, "data": [{"title": "t", "paragraphs": made}]}
        (folder / f"{split}-{version}.json").write_text(json.dumps(root))
    return folder
