"""Bytes and FLOPs of a training step by part, before and after support/fast.py, and the time that a GPU should take for
them. This is a prediction: tensors are fake, nothing is measured, and no GPU is needed.

    python benchmarks/traffic.py --tflops 600 --gb-per-s 2500 3600

Before: eager, in bf16 autocast. Every operation but a view reads its inputs once and writes its outputs once.
After: where `switch_on` compiles, bytes are those that inductor's scheduler counts for each kernel after fusion by its
rules for Triton. It knows all sizes here, as it does not in a run. Everything else is counted as before.
FLOPs are torch's own formulas. An operation takes max(FLOPs / rate, bytes / bandwidth), and a step the sum of these:
launches, Python and communication take no time. Between the given widths, times are interpolated.

Tensors are on a fake CPU, because only a build for CUDA can differentiate fake CUDA tensors. As with autocast on CUDA,
LayerNorms compute and return float32, and attention is computed in bf16.
"""

import argparse
import bisect
import collections
import contextlib
import math
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import systems
import torch
import torch.nn.functional as F
from common import PAPER
from systems import SHAPES, Ours, masked_positions
from torch._inductor import compile_fx, graph, scheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import distill
import prune
from data import Batch
from model import Bert, BertConfig, LayerNorm
from support import fast
from support.checkpoint import load_config
from support.shapes import target_shape

aten = torch.ops.aten
FLOPS = flop_registry | {  # with formulas for fused attention on the CPU
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}
MATMULS = {"mm", "addmm", "bmm"}
GRADIENTS, UPDATE = "sums of gradients", "importance, clipping, AdamW"  # parts


class Operation(NamedTuple):
    part: str
    name: str
    flops: int
    bytes: int


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
        self.first_nodes, self.parts = [0], [GRADIENTS]  # numbers of autograd nodes, and the parts that begin there

    @classmethod
    def is_infra_mode(cls):
        return True  # torch.compile refuses to work under other modes

    def enter(self, part: str):
        self.part = part
        self.first_nodes.append(torch._C._autograd._get_sequence_nr())
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
            part = GRADIENTS if sums else self.parts[bisect.bisect(self.first_nodes, node._sequence_nr()) - 1]
        self.operations.append(Operation(part, name, flops, traffic))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet, name = function.overloadpacket, function.overloadpacket.__name__
        if packet in FLOPS:
            self.record(name, FLOPS[packet](*args, **kwargs, out_val=result), stored_bytes([args, kwargs, result]))
        elif function.namespace == "aten" and name != "_unsafe_view" and not (function.is_view or self.in_kernels):
            changed = [value for value, argument in zip(args, function._schema.arguments, strict=False)
                       if argument.is_write]  # fused optimizers return nothing
            self.record(name, 0, stored_bytes([args, kwargs, changed if result is None else result]))
        return result

    def backend(self, module, inputs):
        return compile_fx.compile_fx(module, inputs, inner_compile=self.count_kernels)

    def count_kernels(self, module, inputs, **settings):
        """Let inductor fuse a graph, and count the bytes of its kernels. Returns a function that records these, and the
        matmuls and attention of the graph as in eager code."""
        kernels = []

        def count_instead(lowering):
            lowering._update_scheduler()
            kernels.extend(node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes
                           if not isinstance(node, scheduler.ExternKernelSchedulerNode))
            raise KernelsCounted

        with patch.object(graph.GraphLowering, "codegen", count_instead), contextlib.suppress(KernelsCounted), \
                compile_fx.config.patch(force_disable_caches=True, cpu_backend="triton"):
            compile_fx.compile_fx_inner(module, inputs, **settings)

        def run(arguments):
            for size in kernels:
                self.record("kernel", 0, size)
            self.in_kernels = True
            results = module(*arguments)
            self.in_kernels = False
            return results

        run._boxed_call = True
        return run


def count(config: BertConfig, shape: prune.Shape, rows: int, seq_length: int, compiled: bool) -> list[Operation]:
    """The operations of one micro-batch and its share of those of an update, for a student of `shape`."""
    torch_compile, traffic = torch.compile, Traffic()
    with FakeTensorMode(), contextlib.ExitStack() as undo:
        for owner, name, new in (
                (torch, "compile", lambda function, **flags: torch_compile(function, **flags | {"dynamic": False})),
                (torch.nn.Module, "to", lambda module, device: module),  # torch cannot move fake parameters
                (systems, "autocast", lambda device, bf16: torch.autocast(device.type, torch.bfloat16)),
                (LayerNorm, "forward", lambda norm, x: F.layer_norm(x.float(), x.shape[-1:], norm.weight, norm.bias))):
            undo.enter_context(patch.object(owner, name, new))
        teacher, student = (Bert(BertConfig(**vars(config)), pooler=False) for _ in range(2))
        system = Ours(teacher, student, config, torch.device("cpu"), bf16=True)
        system.prune_to(shape, system.lineage)
        distiller = system.distiller
        if compiled:
            torch._dynamo.reset()  # torch keeps few compilations of a function
            fast.switch_on(undo, student, teacher, distill, traffic.backend)
        undo.enter_context(traffic.label("other losses, with projections", distiller, "forward"))
        undo.enter_context(traffic.label("vocabulary losses", distill, "vocabulary_losses"))
        for name, bert in (("teacher", teacher), ("student", student)):
            undo.enter_context(traffic.label(f"{name}: embeddings and head", bert, "forward"))
            for layer in bert.bert.layers:
                undo.enter_context(traffic.label(f"{name}: layers", layer, "forward"))
        positions, labels = torch.zeros(2, rows * masked_positions(seq_length), dtype=torch.int64)  # each (M,)
        batch = Batch(torch.zeros(rows, seq_length, dtype=torch.int64), positions, labels)
        for counted in (contextlib.nullcontext(), traffic):  # the first step compiles, and makes gradients and moments
            traffic.operations.clear()
            with counted:
                system.losses(batch)["loss"].backward()
                traffic.enter(UPDATE)
                system.accumulate_sensitivity()
                torch.nn.utils.clip_grad_norm_(distiller.parameters(), PAPER.clip)
                system.optimizer.step()
                traffic.enter(GRADIENTS)
    share = rows / PAPER.batch_size
    return [o._replace(flops=o.flops * share, bytes=o.bytes * share) if o.part == UPDATE else o
            for o in traffic.operations]


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--teacher", type=Path, help="Folder with a config.json. Default: BERT-base.")
    parser.add_argument("--widths", type=int, nargs="+",
                        help="Student widths besides the teacher's. Default: 3/4 and 1/2 of it.")
    parser.add_argument("--micro-batch-size", type=int, default=256, help="Rows of a micro-batch. [%(default)s]")
    parser.add_argument("--seq-length", type=int, default=128, help="Tokens of a row. [%(default)s]")
    parser.add_argument("--tflops", type=float, default=600, help="Rate of bf16 matmuls in TFLOP/s. [%(default)s]")
    parser.add_argument("--gb-per-s", type=float, nargs="+", default=[2500, 3600],
                        help="Memory bandwidths in GB/s. [%(default)s]")
    args = parser.parse_args(argv)
    config = load_config(args.teacher) if args.teacher else SHAPES["base"][0]
    full, micro_batches = prune.Shape.of(config), PAPER.batch_size / args.micro_batch_size
    smaller = args.widths or [full.hidden_size * quarters // 4 for quarters in (2, 3)]
    widths = sorted({*smaller, full.hidden_size}, reverse=True)  # times between them are interpolated
    shapes = [full if width == full.hidden_size else target_shape(config, width) for width in widths]
    steps_at = collections.Counter(
        prune.scheduled_shape(step, 0, PAPER.prune_end * PAPER.steps, full, shapes[-1], PAPER.granularity).hidden_size
        for step in range(PAPER.steps))
    print(f"Counted on fake tensors, not measured: a micro-batch of {args.micro_batch_size} x {args.seq_length} tokens "
          f"and 1/{micro_batches:g} of an update, before -> after")
    milliseconds = collections.defaultdict(list)  # (bandwidth, compiled) -> one number per width
    for shape in shapes:
        sums = collections.defaultdict(lambda: np.zeros((3, 2)))  # part -> TFLOP, GB of matmuls, other GB
        for compiled in (0, 1):
            operations = count(config, shape, args.micro_batch_size, args.seq_length, bool(compiled))
            for o in operations:
                gigabytes, is_matmul = o.bytes / 1e9, o.name in MATMULS
                sums[o.part][:, compiled] += o.flops / 1e12, gigabytes * is_matmul, gigabytes * (not is_matmul)
            for bandwidth in args.gb_per_s:
                milliseconds[bandwidth, compiled].append(
                    sum(max(o.flops / args.tflops / 1e9, o.bytes / bandwidth / 1e6) for o in operations))
        print(f"\n| student width {shape.hidden_size} | TFLOP | matmuls, GB | all else, GB |\n|---|---|---|---|")
        for part, ((flops, _), *gigabytes) in [*sums.items(), ("all", sum(sums.values()))]:
            print(f"| {part} | {flops:.3g} | " + " | ".join(f"{old:.3g} -> {new:.3g}" for old, new in gigabytes) + " |")
    print(f"\nPredicted at {args.tflops:g} TFLOP/s, for {PAPER.steps:,} steps of {PAPER.batch_size} rows:\n\n"
          f"| GB/s | | ms at width {' / '.join(map(str, widths))} | hours |\n|---|---|---|---|")
    for (bandwidth, compiled), ms in sorted(milliseconds.items()):
        hours = np.interp([*steps_at], widths[::-1], ms[::-1]) @ [*steps_at.values()] * micro_batches / 3.6e6
        name, times = ("before", "after")[compiled], " / ".join(f"{t:.3g}" for t in ms)
        print(f"| {bandwidth:g} | {name} | {times} | {hours:.3g} |")


if __name__ == "__main__":
    main(sys.argv[1:])
