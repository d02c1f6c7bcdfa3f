"""Quality on held-out text, speed, and the table at the end of a run."""

import numpy as np
import torch
import torch.nn.functional as F

from data import MaskedRows
from model import Bert
from support.distributed import all_gather_objects, rank_slice, synchronized_time
from support.metrics import spearman


@torch.no_grad()
def evaluate(distiller, teacher: Bert, heldout: MaskedRows, count: int, micro_batch_size: int, device, autocast):
    """Means over `count` rows, spread over the held-out part, and their standard errors over the rows as NAME_se. The
    masks are the same in every evaluation.

    hidden_mse is L_hidn. With a masked-LM head, over the masked positions: kl, KL(teacher || student) in nats;
    masked_lm_loss and top1 accuracy, also as teacher_*; and masked_lm_loss_difference, student minus teacher row by
    row, whose standard error is smaller than that of either loss. The processes share the rows.
    """
    distiller.eval()
    rows: dict[str, list[float]] = {}  # name -> a value per row
    first, last = rank_slice(count)
    for begin in range(first, last, micro_batch_size):
        numbers = np.arange(begin, min(begin + micro_batch_size, last))
        batch = heldout.batch(numbers * len(heldout) // count, seed=0, step=0, first=begin).to(device)
        with autocast():
            outputs = {"": distiller.student(batch.input_ids, batch.positions),
                       "teacher_": teacher(batch.input_ids, batch.positions)}
            projected = distiller.project_hidden(outputs[""].hidden)
        pairs = zip(projected, outputs["teacher_"].hidden, strict=True)
        squares = [F.mse_loss(s.float(), t.float(), reduction="none").mean((1, 2)) for s, t in pairs]  # (B,)
        values = {"hidden_mse": sum(squares) / len(squares)}
        if teacher.cls is not None:
            log_q, log_p = (F.log_softmax(output.logits.float(), dim=-1) for output in outputs.values())  # (M,V)
            values["kl"] = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (M,)
            for name, log in (("", log_q), ("teacher_", log_p)):
                values[f"{name}masked_lm_loss"] = F.nll_loss(log, batch.labels, reduction="none")
                values[f"{name}top1"] = (log.argmax(-1) == batch.labels).float()
            values["masked_lm_loss_difference"] = values["masked_lm_loss"] - values["teacher_masked_lm_loss"]
        for name, value in values.items():  # every row has as many masked positions
            rows.setdefault(name, []).extend(value.view(len(numbers), -1).mean(1).tolist())
    distiller.train()
    gathered = all_gather_objects(rows)
    result = {}
    for name in gathered[-1]:  # a process without rows has no names; the last one has rows
        values = np.concatenate([each.get(name, []) for each in gathered])
        result[name] = float(values.mean())
        result[f"{name}_se"] = float(values.std(ddof=1) / len(values) ** 0.5)
    return result


@torch.no_grad()
def milliseconds_per_row(models: list[Bert], rows: MaskedRows, device, autocast) -> list[float]:
    """Time of the encoder's forward pass per row, in a batch of at most 16: median of 7 after a warm-up, the models in
    alternation."""
    batch = rows.batch(np.arange(min(16, len(rows))), seed=0, step=0).to(device)

    def milliseconds(bert: Bert) -> float:
        start = synchronized_time(device)
        with autocast():
            bert.eval()(batch.input_ids)
        return (synchronized_time(device) - start) * 1000 / len(batch.input_ids)

    times = [[milliseconds(bert) for bert in models] for _ in range(8)]
    return np.median(times[1:], axis=0).tolist()


def sentence_agreement(student, teacher) -> dict[str, float]:
    """How the student's sentence vectors (N,E_s) agree with the teacher's (N,E_t): the Spearman correlation of the
    cosines of all pairs of sentences and, if E_s = E_t, the mean cosine of a sentence's two vectors, and how often the
    student's vector of a sentence is closest to the teacher's of the same sentence."""
    s, t = (F.normalize(vectors.double(), dim=1).cpu() for vectors in (student, teacher))
    pairs = torch.ones(len(s), len(s)).triu(1).bool()
    values = {"sentences": len(s), "student_vector": s.shape[1], "teacher_vector": t.shape[1],
              "sentence_spearman": spearman((s @ s.T)[pairs].numpy(), (t @ t.T)[pairs].numpy())}
    if s.shape == t.shape:
        values["sentence_cosine"] = (s * t).sum(1).mean().item()
        values["own_sentence_first"] = ((s @ t.T).argmax(1) == torch.arange(len(s))).double().mean().item()
    return values


def end_table(teacher: Bert, student: Bert, result: dict, milliseconds: list[float]) -> str:
    """Teacher and student side by side, with standard errors over the held-out rows."""
    configs = teacher.config, student.config
    counts = teacher.parameter_count(), student.parameter_count()
    rows = {"": ("teacher", "student"),
            "hidden / feed-forward size": [f"{c.hidden_size} / {c.intermediate_size}" for c in configs],
            "heads x head size": [f"{c.num_attention_heads} x {c.attention_head_size}" for c in configs],
            "parameters": [f"{count:,}" for count in counts],
            "file in float32, MB": [f"{4 * count / 1e6:.1f}" for count in counts]}
    def value(name: str, form: str = ".3f") -> str:
        return f"{result[name]:{form}} ± {result[f'{name}_se']:{form}}"

    if "kl" in result:
        rows["held-out masked-LM loss"] = value("teacher_masked_lm_loss"), value("masked_lm_loss")
        rows["difference from the teacher"] = "0", value("masked_lm_loss_difference", "+.3f").replace("± +", "± ")
        rows["held-out top-1 accuracy"] = value("teacher_top1", ".1%"), value("top1", ".1%")
        rows["KL to the teacher, nats"] = "0", value("kl")
    rows["hidden states, MSE"] = "0", value("hidden_mse", ".4f")
    if "sentences" in result:
        rows["sentence vector size"] = result["teacher_vector"], result["student_vector"]
        rows["Spearman of cosines"] = "1", f"{result['sentence_spearman']:.3f}"
    if "sentence_cosine" in result:
        rows["cosine to the teacher's"] = "1", f"{result['sentence_cosine']:.3f}"
        rows[f"own sentence first of {result['sentences']:,}"] = "100.0%", f"{result['own_sentence_first']:.1%}"
    rows["milliseconds per row"] = [f"{ms:.2f}" for ms in milliseconds]
    return "\n".join(f"{name:<28}{a:>18}{b:>18}" for name, (a, b) in rows.items())
