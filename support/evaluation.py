"""Quality on held-out text, speed, and the table at the end of a run."""

import statistics

import numpy as np
import torch
import torch.nn.functional as F

from data import MaskedRows
from model import Bert
from support.distributed import all_reduce_sum, rank_slice, synchronized_time


@torch.no_grad()
def evaluate(distiller, teacher: Bert, heldout: MaskedRows, count: int, micro_batch_size: int, device, autocast):
    """Means over `count` held-out rows, whose masks are always the same: L_hidn and, over the masked positions,
    KL(teacher || student) in nats and masked-LM loss and top-1 accuracy of both (these need a masked-LM head).
    The processes share the rows."""
    distiller.eval()
    sums: dict[str, float] = {}
    first, last = rank_slice(count)
    for begin in range(first, last, micro_batch_size):
        indices = np.arange(begin, min(begin + micro_batch_size, last))
        batch = heldout.batch(indices, seed=0, step=0, first=begin).to(device)
        with autocast():
            outputs = {"": distiller.student(batch.input_ids, batch.positions),
                       "teacher_": teacher(batch.input_ids, batch.positions)}
            values = {"hidden_mse": distiller.hidden_loss(outputs[""], outputs["teacher_"])}
        if teacher.cls is not None:
            student_log_q, teacher_log_p = (F.log_softmax(o.logits.float(), dim=-1) for o in outputs.values())  # (M,V)
            values["masked_lm_loss"] = F.nll_loss(student_log_q, batch.labels)
            values["kl"] = F.kl_div(student_log_q, teacher_log_p, log_target=True, reduction="batchmean")
            values["teacher_masked_lm_loss"] = F.nll_loss(teacher_log_p, batch.labels)
            for name, output in outputs.items():
                values[f"{name}top1"] = (output.logits.argmax(-1) == batch.labels).float().mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch.input_ids)
    distiller.train()
    return {name: value / count for name, value in all_reduce_sum(sums).items()}


@torch.no_grad()
def milliseconds_per_row(models: list[Bert], rows: MaskedRows, device, autocast) -> list[float]:
    """Forward time per row in a batch of at most 16: median of 7 after a warm-up, the models in alternation."""
    batch = rows.batch(np.arange(min(16, len(rows))), seed=0, step=0).to(device)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(8):
        for bert, measured in zip(models, times, strict=True):
            start = synchronized_time(device)
            with autocast():
                bert.eval()(batch.input_ids)
            measured.append((synchronized_time(device) - start) * 1000 / len(batch.input_ids))
    return [statistics.median(measured[1:]) for measured in times]


def end_table(teacher: Bert, student: Bert, result: dict, milliseconds: list[float]) -> str:
    """Teacher and student side by side."""
    configs = teacher.config, student.config
    counts = teacher.parameter_count(), student.parameter_count()
    rows = {"": ("teacher", "student"),
            "hidden / feed-forward size": [f"{c.hidden_size} / {c.intermediate_size}" for c in configs],
            "heads x head size": [f"{c.num_attention_heads} x {c.attention_head_size}" for c in configs],
            "parameters": [f"{count:,}" for count in counts],
            "file in float32, MB": [f"{4 * count / 1e6:.1f}" for count in counts]}
    if "kl" in result:
        rows["held-out masked-LM loss"] = f"{result['teacher_masked_lm_loss']:.3f}", f"{result['masked_lm_loss']:.3f}"
        rows["held-out top-1 accuracy"] = f"{result['teacher_top1']:.1%}", f"{result['top1']:.1%}"
        rows["KL to the teacher, nats"] = "0", f"{result['kl']:.3f}"
    rows["hidden states, MSE"] = "0", f"{result['hidden_mse']:.4f}"
    rows["milliseconds per row"] = [f"{ms:.2f}" for ms in milliseconds]
    return "\n".join(f"{name:<28}{a:>14}{b:>14}" for name, (a, b) in rows.items())
