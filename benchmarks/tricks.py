"""Tricks that were tried on the step of distill.py, each beside the step as it is: does it pay?

    python benchmarks/tricks.py --shape small --device cpu --json benchmarks/results/tricks-small-cpu.json

In alternation on the same batch, at full and at target width. `gain`: how much faster a step is than without the trick,
in percent, median, smallest and largest over the repeats. `first`: seconds of the first step at a width, in which
torch.compile works; a run meets many widths, and at each of them it works anew.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import header, write
from systems import SHAPES, Ours, random_batch, target

import prune
from model import Bert, SelfAttention
from run import find_device, now, reuse_memory


class GroupedProjections(Ours):
    """Queries, keys and values in one product, of the three matrices one above the other."""

    def convert(self, bert):
        for layer in bert.bert.layers:
            layer.attention["self"].__class__ = GroupedAttention
        return bert


class GroupedAttention(SelfAttention):
    def forward(self, x):
        linears = self.query, self.key, self.value
        weight, bias = torch.cat([m.weight for m in linears]), torch.cat([m.bias for m in linears])
        return F.linear(x, weight, bias).chunk(3, -1)


class AdamByTensor(Ours):
    """Adam as a loop over the tensors, operation by operation."""

    options = {"foreach": False}

    def make_optimizer(self):
        ours = super().make_optimizer()
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in ours.param_groups]
        return torch.optim.AdamW(groups, betas=ours.defaults["betas"], eps=ours.defaults["eps"], **self.options)


class AdamForeach(AdamByTensor):
    """Adam operation by operation, each over all tensors at once."""

    options = {"foreach": True}


class CompiledLayers(Ours):
    """torch.compile of every layer, for the shapes that it has now."""

    def convert(self, bert):
        for layer in bert.bert.layers:
            layer.compile(dynamic=False)
        return bert


class NoBookkeeping(Ours):
    """Neither sensitivities nor the norm of the gradient: what joining both into one pass could gain at most. No way to
    train."""

    def step(self, batches):
        for batch in batches:
            (self.losses(batch)["loss"] / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


TRICKS = {"grouped Q, K, V": GroupedProjections, "Adam by tensor": AdamByTensor, "Adam foreach": AdamForeach,
          "compiled layers": CompiledLayers, "no sensitivities, no norm": NoBookkeeping}


def measure(args, device) -> list[dict]:
    torch.manual_seed(0)
    config, _, rows = SHAPES[args.shape]
    teacher = Bert(copy.copy(config), pooler=False)
    batches = [random_batch(args.shape, args.batch_size or rows, device)]
    found = []
    for trick, system in TRICKS.items():
        pair = [cls(copy.deepcopy(teacher), copy.deepcopy(teacher), copy.copy(config), device, device.type == "cuda")
                for cls in (Ours, system)]
        for width in (config.hidden_size, target(config).hidden):
            seconds = [[], []]
            for each in pair:
                if width < config.hidden_size:
                    each.narrow(target(config), prune.unit_importance("magnitude", each.distiller, {}, 0))
            for repeat in range(args.repeats + 2):
                for which in ((0, 1), (1, 0))[repeat % 2]:
                    start = now(device)
                    pair[which].step(batches)
                    seconds[which].append(now(device) - start)
            gains = [100 * (ours / trick - 1) for ours, trick in zip(*(each[2:] for each in seconds), strict=True)]
            found.append({"trick": trick, "width": width, "first": seconds[1][0],
                          "gain": [statistics.median(gains), min(gains), max(gains)]})
            print("{trick:<26}{width:>5}  first step {first:.1f} s  gain {gain[0]:+.1f} % ({gain[1]:+.1f} to "
                  "{gain[2]:+.1f})".format(**found[-1]), flush=True)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="The teacher; the target is half its width.")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bf16).")
    parser.add_argument("--repeats", type=int, default=10, help="Pairs of steps timed at each width [%(default)s].")
    parser.add_argument("--batch-size", type=int, help="Sequences in a step. 8 or 16: base, small.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of the CPU [%(default)s].")
    parser.add_argument("--json", type=Path, help="Where the result goes.")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    torch.set_num_threads(args.threads)
    reuse_memory()
    result = header(argv, device) | {"tricks": measure(args, device)}
    if args.json:
        write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
