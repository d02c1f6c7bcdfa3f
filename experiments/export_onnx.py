"""Export a student for onnxruntime, and check that it computes the same there.

    python experiments/export_onnx.py runs/demo/student student.onnx

Inputs `input_ids`, `attention_mask` and `token_type_ids` (B,S) int64, any B and S; outputs `last_hidden_state` (B,S,D)
and, if the checkpoint has a masked-LM head, `logits` (B,S,V). This needs onnx, onnxscript and onnxruntime.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Bert  # noqa: E402
from support.checkpoint import load_model  # noqa: E402
from support.errors import InputError  # noqa: E402
from support.hub import find_model  # noqa: E402

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Standard(nn.Module):
    """A Bert with the inputs and outputs of `transformers`: a mask, and logits at all positions."""

    def __init__(self, bert: Bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask, token_type_ids):
        hidden = self.bert(input_ids, None, token_type_ids, attention_mask).hidden[-1]
        if self.bert.cls is None:
            return (hidden,)
        return hidden, self.bert.cls["predictions"](hidden, self.bert.bert.embeddings.word_embeddings.weight)


def example(vocab_size: int, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """Random ids with padding at the end of every row but the first, and two segments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return ids, mask, (torch.arange(length) >= length // 2).long().expand(rows, length).contiguous()


def export(folder: Path, path: Path) -> float:
    """Write the checkpoint in `folder` to `path`, and return the largest difference between our outputs and those of
    onnxruntime, on a batch of another shape than the exported one. Raises InputError."""
    bert = Standard(load_model(folder)).eval()
    config = bert.bert.config
    names = ["last_hidden_state", "logits"] if bert.bert.cls is not None else ["last_hidden_state"]
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=config.max_position_embeddings)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own code
        torch.onnx.export(bert, example(config.vocab_size, 2, 8), path, input_names=INPUTS, output_names=names,
                          dynamo=True, dynamic_shapes=(shape,) * 3, external_data=False, verbose=False)
    inputs = example(config.vocab_size, 3, min(16, config.max_position_embeddings))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    theirs = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)})
    with torch.no_grad():
        ours = bert(*inputs)
    token = inputs[1].bool()  # what is computed at padding does not matter
    return max(np.abs(a[token].numpy() - b[token.numpy()]).max().item() for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="folder of a checkpoint")
    parser.add_argument("output", type=Path, help="the .onnx file")
    args = parser.parse_args(argv)
    try:
        difference = export(find_model(args.student), args.output)
    except (InputError, OSError) as error:
        print(f"export_onnx.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: largest difference between the outputs {difference:.1e}")
    return int(difference > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
