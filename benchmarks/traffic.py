"""Bytes and FLOPs of a training step by part, before and after support/fast.py, and the time that a GPU should take for
them. This is a prediction: tensors are fake, nothing is measured, and no GPU is needed.

    python benchmarks/traffic.py --tflops 600 --gb-per-s 2500 3600

Before: eager, in bf16 autocast. Every operation but a view reads its inputs once and writes its outputs once.
After: where `switch_on` compiles, bytes are those that inductor's scheduler counts for every kernel after fusion. It
fuses for the CPU, which may differ from a GPU in detail. Everything else is counted as before.
FLOPs are torch's own formulas. An operation takes max(FLOPs / rate, bytes / bandwidth), and a step the sum of these:
launches, Python and communication take no time. Between the given widths, times are interpolated.

Tensors are on a fake CPU, because only a build for CUDA can differentiate fake CUDA tensors. LayerNorms compute and
return float32, as with autocast on CUDA.
"""

import argparse
import bisect
import collections
import contextlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from common import PAPER
from systems import ALPHAS, SHAPES, masked_positions
from torch._inductor import compile_fx, graph, scheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import distill
import model
import prune
from data import Batch
from support import fast
from support.checkpoint import load_config
from support.shapes import target_shape

aten = torch.ops.aten
FLOPS = flop_registry | {  # with formulas for fused attention on the CPU
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}
MATMULS = {"mm", "addmm", "bmm"}
FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided"}  # beside views
GRADIENTS, UPDATE = "sums of gradients", "importance, clipping, AdamW"  # parts


class Operation(NamedTuple):
    part: str
    name: str
    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


class KernelsCounted(BaseException):
    """Leaves inductor before it generates code. Not an Exception, because torch replaces those by its own."""


def stored_bytes(values) -> int:
    """Of all tensors in nested lists. Dimensions that are only expanded have stride 0."""
    return sum(math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.itemsize
               for t in tree_leaves(values) if isinstance(t, torch.Tensor))


class Traffic(TorchDispatchMode):
    """Records all operations, by part, while it is entered. `backend` is one for torch.compile."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.part, self.in_kernels = GRADIENTS, False
        self.nodes, self.parts = [0], [GRADIENTS]  # the first autograd node of a part, by number, and that part

    @classmethod
    def is_infra_mode(cls):
        return True  # torch.compile refuses to work under other modes

    def enter(self, part: str):
        self.part = part
        self.nodes.append(torch._C._autograd._get_sequence_nr())
        self.parts.append(part)

    def label(self, part: str, owner, name: str):
        """A context in which what the function `owner.name` does, and its backward pass, belongs to `part`."""
        function = getattr(owner, name)

        def labelled(*args, **kwargs):
            outer = self.part
            self.enter(part)
            result = function(*args, **kwargs)
            self.enter(outer)
            return result

        return patch.object(owner, name, labelled)

    def record(self, name: str, flops: int, traffic: int):
        node, part = torch._C._current_autograd_node(), self.part
        if node is not None:  # in the backward pass
            sums = node.name().endswith("AccumulateGrad")
            part = GRADIENTS if sums else self.parts[bisect.bisect(self.nodes, node._sequence_nr()) - 1]
        self.operations.append(Operation(part, name, flops, traffic))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet, name = function.overloadpacket, function.overloadpacket.__name__
        if packet in FLOPS:
            self.record(name, FLOPS[packet](*args, **kwargs, out_val=result), stored_bytes([args, kwargs, result]))
        elif function.namespace == "aten" and not function.is_view and name not in FREE and not self.in_kernels:
            changed = [value for value, argument in zip(args, function._schema.arguments, strict=False)
                       if argument.is_write]  # a fused optimizer returns nothing
            self.record(name, 0, stored_bytes([args, kwargs]) + stored_bytes(result if result is not None else changed))
        return result

    def backend(self, graph_module, inputs):
        return compile_fx.compile_fx(graph_module, inputs, inner_compile=self.count_kernels)

    def count_kernels(self, graph_module, inputs, **settings):
        """Let inductor fuse a graph and count the bytes of its kernels. Returns a function that records these, and the
        matmuls and attention of the graph as in eager code."""
        kernels = []

        def count(lowering):
            lowering._update_scheduler()
            kernels.extend(node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes
                           if not isinstance(node, scheduler.ExternKernelSchedulerNode))
            raise KernelsCounted

        with patch.object(graph.GraphLowering, "codegen", count), contextlib.suppress(KernelsCounted), \
                compile_fx.config.patch(force_disable_caches=True):
            compile_fx.compile_fx_inner(graph_module, inputs, **settings)

        def run(arguments):
            for size in kernels:
                self.record("kernel", 0, size)
            self.in_kernels = True
            results = graph_module(*arguments)
            self.in_kernels = False
            return results

        run._boxed_call = True
        return run


def float32_norm(norm: model.LayerNorm, x):
    return F.layer_norm(x.float(), norm.weight.shape, norm.weight, norm.bias, norm.eps)


def pruned_distiller(config: model.BertConfig, shape: prune.Shape) -> distill.Distiller:
    distiller = distill.Distiller(model.Bert(model.BertConfig(**vars(config)), pooler=False), ALPHAS).train()
    sizes = {"hidden": shape.hidden_size, "feed_forward": shape.intermediate_size}
    prune.prune_units(distiller, {group: torch.arange(sizes.get(group.split(".")[0], shape.num_heads * shape.head_size))
                                  for group in prune.teacher_indices(distiller)}, shape)
    distiller.student.set_dropout(PAPER.dropout)
    return distiller


def count(config: model.BertConfig, shape: prune.Shape, rows: int, seq_length: int, compiled: bool) -> list[Operation]:
    """The operations of one micro-batch and of its share in an update, for a student of `shape`."""
    torch_compile, masked = torch.compile, rows * masked_positions(seq_length)

    def compile_every_shape(function, **settings):  # so that all sizes, and with them the bytes, are known
        return torch_compile(function, **settings | {"dynamic": False})

    with FakeTensorMode(), patch.object(model.LayerNorm, "forward", float32_norm), contextlib.ExitStack() as undo:
        teacher = model.Bert(config, pooler=False).eval().requires_grad_(False)
        distiller = pruned_distiller(config, shape)
        student, optimizer = distiller.student, distill.make_optimizer(distiller, PAPER.weight_decay)
        traffic, statistics = Traffic(), {}
        if compiled:
            torch._dynamo.reset()  # torch keeps few shapes of a function
            with patch.object(torch, "compile", compile_every_shape):
                fast.switch_on(undo, student, teacher, distill, traffic.backend)
        for part, owner, name in (
                ("other losses, with projections", distiller, "forward"),
                ("vocabulary losses", distill, "vocabulary_losses"),
                *((f"{name}: embeddings and head", bert, "forward")
                  for name, bert in (("teacher", teacher), ("student", student))),
                *((f"{name}: layers", layer, "forward")
                  for name, bert in (("teacher", teacher), ("student", student)) for layer in bert.bert.layers)):
            undo.enter_context(traffic.label(part, owner, name))
        session = SimpleNamespace(teacher=teacher, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        state = SimpleNamespace(engine=distiller, distiller=distiller)
        batch = Batch(torch.zeros(rows, seq_length, dtype=torch.int64), *torch.zeros(2, masked, dtype=torch.int64))
        for counted in (contextlib.nullcontext(), traffic):  # the first step compiles, and makes gradients and moments
            traffic.operations.clear()
            with counted:
                distill.losses_and_gradients(session, state, batch, 1.0, is_last=True, ranking_only=False)
                traffic.enter(UPDATE)
                prune.accumulate_importance("sensitivity", statistics, student, PAPER.sensitivity_decay)
                torch.nn.utils.clip_grad_norm_(distiller.parameters(), PAPER.clip)
                optimizer.step()
                traffic.enter(GRADIENTS)
    share = {UPDATE: rows / PAPER.batch_size}
    return [Operation(*names, *(value * share.get(names[0], 1) for value in values))
            for *names, values in ((o.part, o.name, (o.flops, o.bytes)) for o in traffic.operations)]


def by_part(operations: list[Operation]) -> dict[str, np.ndarray]:
    """FLOPs, bytes of matmuls and bytes beside them of every part, and of all."""
    sums = collections.defaultdict(lambda: np.zeros(3))
    for o in operations:
        for part in (o.part, "all"):
            sums[part] += (o.flops, o.bytes * (o.name in MATMULS), o.bytes * (o.name not in MATMULS))
    return sums


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--teacher", type=Path, help="folder with a config.json; default: BERT-base")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 576, 384],
                        help="hidden sizes of the student, from the teacher's to the last")
    parser.add_argument("--micro-batch-size", type=int, default=256, help="rows")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--tflops", type=float, default=600, help="rate of bf16 matmuls, TFLOP/s")
    parser.add_argument("--gb-per-s", type=float, nargs="+", default=[2500, 3600], help="memory bandwidths")
    args = parser.parse_args(argv)
    config = load_config(args.teacher) if args.teacher else SHAPES["base"][0]
    full = prune.Shape.of(config)
    shapes = [full if width == full.hidden_size else target_shape(config, width) for width in args.widths]
    steps_at = collections.Counter(
        prune.scheduled_shape(step, 0, PAPER.prune_end * PAPER.steps, full, shapes[-1], PAPER.granularity).hidden_size
        for step in range(PAPER.steps))
    counts = {}  # before and after: a list of operations for every width
    print(f"Counted on fake tensors, not measured: {args.micro_batch_size} x {args.seq_length} tokens, before -> after")
    for compiled in (False, True):
        counts[compiled] = [count(config, shape, args.micro_batch_size, args.seq_length, compiled) for shape in shapes]
    for shape, before, after in zip(shapes, counts[False], counts[True], strict=True):
        print(f"\n| part, student width {shape.hidden_size} | TFLOP | matmuls, GB | all else, GB |\n|---|---|---|---|")
        new = by_part(after)
        for part, old in by_part(before).items():
            print(f"| {part} | {old[0] / 1e12:.2f} | "
                  + " | ".join(f"{old[i] / 1e9:.1f} -> {new[part][i] / 1e9:.1f}" for i in (1, 2)) + " |")
    print(f"\nPredicted at {args.tflops:g} TFLOP/s: ms at widths {' / '.join(map(str, args.widths))}, hours of "
          f"{PAPER.steps:,} steps of {PAPER.batch_size} rows\n\n| GB/s | | ms | hours |\n|---|---|---|---|")
    for bandwidth in args.gb_per_s:
        for compiled, name in enumerate(("before", "after")):
            seconds = [sum(o.seconds(args.tflops * 1e12, bandwidth * 1e9) for o in operations)
                       for operations in counts[bool(compiled)]]
            times = np.interp(list(steps_at), args.widths[::-1], seconds[::-1])
            hours = times @ list(steps_at.values()) * PAPER.batch_size / args.micro_batch_size / 3600
            print(f"| {bandwidth:g} | {name} | {' / '.join(f'{s * 1e3:.1f}' for s in seconds)} | {hours:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
