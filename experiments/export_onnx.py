"""Export a student for onnxruntime, and compare its outputs there.

    python experiments/export_onnx.py runs/demo/student student.onnx
    python experiments/export_onnx.py runs/demo/student student.onnx --int8    # and student.int8.onnx

Inputs `input_ids`, `attention_mask` and `token_type_ids` (B,S) int64, any B, and S up to the model's positions; outputs
`last_hidden_state` (B,S,D), `logits` (B,S,V) if there is a masked-LM head, and `sentence_embedding` (B,E) of a sentence
encoder. This needs onnx, onnxscript and onnxruntime.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import quantize_dynamic
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import BertConfig  # noqa: E402
from support.checkpoint import load_model  # noqa: E402
from support.errors import InputError  # noqa: E402
from support.hub import find_model  # noqa: E402
from support.sentence_encoder import SentenceEncoder  # noqa: E402

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LARGEST_DIFFERENCE, SMALLEST_COSINE = 1e-3, 0.95  # of the float32 and the int8 file


class Student(nn.Module):
    """The model in a folder with the inputs and outputs of `transformers`: a mask, and logits at all positions; and
    sentence embeddings. Raises InputError."""

    def __init__(self, folder: Path):
        super().__init__()
        self.bert = load_model(folder).eval()
        self.encoder = SentenceEncoder.read(folder, self.bert.config)

    def forward(self, input_ids, attention_mask, token_type_ids) -> dict[str, torch.Tensor]:
        hidden = self.bert(input_ids, None, token_type_ids, attention_mask).hidden[-1]
        outputs = {"last_hidden_state": hidden}
        if self.bert.cls is not None:
            outputs["logits"] = self.bert.cls["predictions"](hidden, self.bert.bert.embeddings.word_embeddings.weight)
        if self.encoder:
            outputs["sentence_embedding"] = self.encoder.after_pooling(self.encoder.pool(hidden, attention_mask))
        return outputs


def example(config: BertConfig, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """Random ids with padding at the end of every row but the first, and two segments if the model knows two."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    second = (torch.arange(length) >= length // 2).long() * min(1, config.type_vocab_size - 1)
    return ids, mask, second.expand(rows, length).contiguous()


@torch.no_grad()
def export(student: Student, path: Path):
    """Write the student to `path`, for any batch size and length."""
    config = student.bert.config
    inputs = example(config, 2, 8)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=config.max_position_embeddings)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own code
        torch.onnx.export(student, inputs, path, input_names=INPUTS, output_names=list(student(*inputs)), dynamo=True,
                          dynamic_shapes=(shape,) * 3, external_data=False, verbose=False)


def quantize(path: Path, output: Path):
    """Write the file `path` with weights in int8; activations are quantized while it runs. Every output of a matrix has
    its own scale. Only seven bits are used, because products of eight saturate on CPUs without VNNI."""
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime recommends its own preprocessing
    quantize_dynamic(path, output, per_channel=True, reduce_range=True)


@torch.no_grad()
def check(student: Student, paths: list[Path]) -> bool:
    """Whether the float32 file (by differences) and the int8 file, if there is one (by the cosine), agree with the
    student on a batch of another shape than the exported one. Prints sizes, times per row (the median of 7 runs, the
    files in alternation), largest differences, and mean cosines of the sentence embeddings or, without these, of the
    hidden states."""
    config = student.bert.config
    rows, length = 8, min(64, config.max_position_embeddings)
    inputs = example(config, rows, length)
    feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
    token = inputs[1].bool()  # what is computed at padding does not matter
    ours = student(*inputs)
    main_output = "sentence_embedding" if student.encoder else "last_hidden_state"
    sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]

    def milliseconds(session) -> float:
        start = time.perf_counter()
        session.run(None, feeds)
        return (time.perf_counter() - start) * 1000 / rows

    times = np.median([[milliseconds(session) for session in sessions] for _ in range(8)][1:], axis=0)
    passed = True
    for path, session, time_per_row in zip(paths, sessions, times, strict=True):
        theirs = dict(zip(ours, map(torch.from_numpy, session.run(list(ours), feeds)), strict=True))
        pairs = {name: [x if x.dim() == 2 else x[token] for x in (theirs[name], ours[name])] for name in ours}
        difference = torch.stack([(a - b).abs().max() for a, b in pairs.values()]).max()
        cosine = F.cosine_similarity(*pairs[main_output], dim=-1).mean()
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {time_per_row:.2f} ms per row ({rows} x {length} tokens), "
              f"largest difference {difference:.1e}, mean cosine {cosine:.4f}")
        passed &= bool(difference <= LARGEST_DIFFERENCE if path == paths[0] else cosine >= SMALLEST_COSINE)
    return passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="Folder of a checkpoint.")
    parser.add_argument("output", type=Path, help="The .onnx file to write.")
    parser.add_argument("--int8", action="store_true", help="Also write a quantized file, which ends in .int8.onnx.")
    args = parser.parse_args(argv)
    paths = [args.output, args.output.with_suffix(".int8.onnx")][: 1 + args.int8]
    try:
        student = Student(find_model(args.student))
        export(student, args.output)
        if args.int8:
            quantize(*paths)
    except (InputError, OSError) as error:
        print(f"export_onnx.py: error: {error}", file=sys.stderr)
        return 2
    passed = check(student, paths)
    if not passed:
        print(f"export_onnx.py: a file is too far from the student; allowed are {LARGEST_DIFFERENCE:g} in float32, "
              f"a cosine of {SMALLEST_COSINE:g} in int8", file=sys.stderr)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
