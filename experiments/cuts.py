"""One cut without training: how much harm it does plain, with aligned heads, compensated, and with both.

KL to the teacher on held-out rows, right after units were chosen by sensitivity and cut. --teacher and --corpus as in
distill.py; the rows of the evaluation are not those on which anything is fitted.
"""

import contextlib
import copy

import experiment
from experiment import plt

import data
import distill
import improve
import model
import prune
import run

PARTS = {"hidden": ("hidden",), "feed-forward": ("intermediate",), "heads": ("head_size",),
         "all of them": ("hidden", "intermediate", "head_size")}
CASES = {"hidden to 7/8": ("hidden", 7 / 8), "hidden to 1/2": ("hidden", 1 / 2),
         "feed-forward to 1/2": ("feed-forward", 1 / 2), "head dimensions to 1/2": ("heads", 1 / 2),
         "all of them to 1/2": ("all of them", 1 / 2)}
ARMS = {"plain": (False, False), "compensated": (False, True), "aligned": (True, False), "both": (True, True)}
ROWS, MICRO = 16, 16


def measure(args) -> dict:
    device, nothing = run.find_device("cpu"), contextlib.nullcontext
    folder = model.find_model(args.teacher)
    teacher = model.load_model(folder).eval().requires_grad_(False)
    tokenizer = data.load_tokenizer(folder, teacher.config.vocab_size)
    tokens = data.tokenise([args.corpus], tokenizer, distill.parse_arguments([]).cache_dir)
    rows, heldout = (data.Rows(part, 128, tokenizer) for part in (tokens.train, tokens.heldout))
    count = min(args.rows, len(heldout))
    first = prune.Widths.of(teacher.config)
    found = []
    for seed in args.seeds:
        def batches(units, seed=seed):
            return improve.fit_batches(rows, units, seed, 100, ROWS, MICRO, device)

        for case, (part, share) in CASES.items():
            new = first._replace(**{name: int(getattr(first, name) * share) for name in PARTS[part]})
            for arm, (aligned, compensated) in ARMS.items():
                student = copy.deepcopy(teacher).requires_grad_(True)
                distiller = distill.Distiller(student, dict.fromkeys(("mlm", "pred", "hidn", "emb", "attn"), 1.0))
                if aligned:
                    improve.align_heads(student, batches(first.hidden))
                average = {}
                for step in range(4):
                    batch = rows.training_batch(seed, step, ROWS, 0, ROWS)
                    distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))["loss"].backward()
                    prune.accumulate_sensitivity(average, distiller, 0.9)
                    distiller.zero_grad()
                keep = prune.choose_units(average, first, new)
                if compensated:
                    improve.compensate(distiller, keep, batches(max(map(len, keep.values()))))
                prune.cut(distiller, keep, new)
                kl = distill.evaluate(distiller, teacher, heldout, count, MICRO, device, nothing)["kl"]
                found.append({"case": case, "arm": arm, "seed": seed, "kl": kl})
                print(case, arm, seed, f"{kl:.3f}", flush=True)
    return {"teacher": experiment.Path(args.teacher).name, "eval_rows": count, "rows": found}


def draw(result: dict):
    cases = experiment.rows_of(result["rows"], "case")
    figure, axes = plt.subplots(1, len(cases), figsize=(16, 3), layout="constrained", sharey=True)
    for axis, (case, rows) in zip(axes, cases.items(), strict=True):
        experiment.bars(axis, rows, lambda row: row["kl"], case)
    figure.suptitle(f"KL right after one cut, no training; {result['eval_rows']} held-out rows, "
                    f"{len({row['seed'] for row in result['rows']})} draws of the rows that are fitted")
    return figure


if __name__ == "__main__":
    experiment.main(
        "cuts", __doc__, measure, draw,
        ("--teacher", {"default": str(experiment.ROOT / "teachers" / "small")}),
        ("--corpus", {"default": "demo"}), ("--rows", {"type": int, "default": 64}))
