"""Tokens per second of a training step, beside two ways to write the same step with stock `transformers` modules.

    python benchmarks/throughput.py --shape small --device cpu --quick --json benchmarks/results/small-cpu.json

The three systems of systems.py make the same steps on the same batches, in alternation. Nothing is timed before their
losses have been found to agree. Weights and tokens are random: the time of a step does not depend on them.

What the figures mean:
    tokens_per_second   median over the repeats; `spread` is their smallest and largest
    ratio               tokens/s of ours over those of a peer, in the same repeat: median, smallest and largest
    utilisation         the matrix products that the system itself does in a step (counted, `flops_per_token`; what is
                        computed again in the backward pass does not count), over its time, over the rate of a
                        large product measured in the same repeat
    width "run"         a whole run: the time of a step at every width of the cubic schedule, interpolated between those
                        measured, and for ours all cuts of the run, each of them made and timed; `cut_share` of it
    peak_memory         MB: of a process of its own that only this system runs in; on CUDA that of tensors
"""

import argparse
import collections
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from common import RECIPE, alone, header, process, write
from systems import SHAPES, SYSTEMS, build, check_all, random_batch, target

import distill
import prune
from prune import Widths
from run import find_device, memory_mb, now, reuse_memory

CUDA_BATCH, CUDA_MICRO_BATCH = 1024, 256  # sequences in a step and at a time


def product_rate(matrix: torch.Tensor) -> float:
    """Operations per second of a large matrix product: the fastest of three timings, for that is what the machine can
    do. A single one, in a process that has just waited for others, can be a third too slow."""
    count, seconds = 20 if matrix.is_cuda else 1, []
    for _ in range(3):
        start = now(matrix.device)
        for _ in range(count):
            matrix @ matrix
        seconds.append(now(matrix.device) - start)
    return count * 2 * len(matrix) ** 3 / min(seconds)


def schedule(args: argparse.Namespace, cuda: bool) -> tuple[dict[Widths, int], list[Widths]]:
    """The widths of the run that is projected, in order, with the number of steps at each; and those to measure, evenly
    spaced from the first to the last."""
    config = SHAPES[args.shape][0]
    first, last = Widths.of(config), target(config)
    steps_at = collections.Counter(
        prune.scheduled_widths(step, 0, RECIPE.prune_end * args.steps, first, last, RECIPE.granularity)
        for step in range(args.steps))
    wanted = np.linspace(first.hidden, last.hidden, 3 if args.quick else 9 if cuda else 5)
    measured = [min(steps_at, key=lambda widths: abs(widths.hidden - hidden)) for hidden in wanted[:-1]]  # noqa: B023
    return steps_at, [*measured, last]


def peak_memory(shape: str, name: str, device, bf16: bool, threads: int, sizes: list[int], at: list[Widths]):
    """MB that a system needs at each of the widths `at`; for a process of its own. On the CPU give one at a time: the
    peak of a process never falls."""
    torch.set_num_threads(threads)
    system = build(shape, [name], device, bf16)[name]
    batches = [random_batch(shape, rows, device) for rows in sizes]
    peaks = []
    for new in at:
        if new != system.widths:
            system.narrow(new, prune.unit_importance("magnitude", system.distiller, {}, 0))
        memory_mb(device)
        for _ in range(2):  # the first step makes Adam's moments
            system.step(batches)
        peaks.append(memory_mb(device))
    return peaks


def peak_memories(args: argparse.Namespace, device, sizes: list[int], measured: list[Widths]) -> dict[str, list[float]]:
    """System -> MB at each of the widths `measured`. Under masks everything keeps its full size."""
    cuda = device.type == "cuda"

    def peaks(name: str, at: list[Widths]) -> list[float]:
        return alone(peak_memory, args.shape, name, device, cuda, args.threads, sizes, at)

    ours = peaks("ours", measured) if cuda else [peaks("ours", [widths])[0] for widths in measured]
    return {"ours": ours} | {name: peaks(name, measured[:1]) * len(measured) for name in ("usual", "stock-best")}


LIVE: dict = {}  # of a process that runs one system: the system, its batches


def begin(name: str, shape: str, device, bf16: bool, threads: int, sizes: list[int]):
    torch.set_num_threads(threads)
    if name != "usual":  # distill.py does so, and whoever wants the best can
        reuse_memory()
    LIVE.update(system=build(shape, [name], device, bf16)[name],
                batches=[random_batch(shape, rows, device) for rows in sizes])


def cut_ours(new: Widths) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds that the cut took, and the units that are left."""
    return LIVE["system"].narrow(new, LIVE["system"].sensitivity), LIVE["system"].lineage


def mask_peer(new: Widths, lineage: dict[str, torch.Tensor]):
    LIVE["system"].narrow(new, lineage)


def step_seconds() -> float:
    start = now(LIVE["system"].device)
    LIVE["system"].step(LIVE["batches"])
    return now(LIVE["system"].device) - start


def time_steps(args: argparse.Namespace, device, sizes: list[int], steps_at: dict[Widths, int], measured: list[Widths]):
    """Walk down the schedule cut by cut; at the widths `measured` time one step of each system in turn, and a product.
    Each system has a process of its own, so that the memory of one is not the other's.

    Returns system -> seconds of a step (repeats, widths), the rates of the product (repeats, widths), and the seconds
    of all cuts.
    """
    cuda = device.type == "cuda"
    matrix = torch.randn(*2 * [8192 if cuda else 2048], device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    seconds = {name: np.empty((args.repeats, len(measured))) for name in SYSTEMS}
    rates, cut_seconds = np.empty((args.repeats, len(measured))), 0.0
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(process()) for name in SYSTEMS}
        for name, pool in pools.items():
            pool.submit(begin, name, args.shape, device, cuda, args.threads, sizes).result()
        widths = Widths.of(SHAPES[args.shape][0])
        for new in steps_at:
            if new != widths:
                cut, lineage = pools["ours"].submit(cut_ours, new).result()
                cut_seconds, widths = cut_seconds + cut, new
            if new not in measured:
                continue
            for name in ("usual", "stock-best") if measured.index(new) else ():
                pools[name].submit(mask_peer, new, lineage).result()
            column = measured.index(new)
            for repeat in (0, *range(args.repeats)):  # the first is a warm-up, and overwritten
                for name, pool in pools.items():
                    seconds[name][repeat, column] = pool.submit(step_seconds).result()
                rates[repeat, column] = product_rate(matrix)
    return seconds, rates, cut_seconds


def measure(args: argparse.Namespace, device) -> dict:
    """Everything for one shape: `rows`, the rate of a large product, on CUDA for BERT-base also `recipe`, its time."""
    cuda = device.type == "cuda"
    config, seq_length, _ = SHAPES[args.shape]
    sizes = [min(args.micro_batch_size, args.batch_size - i) for i in range(0, args.batch_size, args.micro_batch_size)]
    steps_at, measured = schedule(args, cuda)
    check_all(args.shape, device)
    memory = peak_memories(args, device, sizes, measured)
    seconds, rates, cut_seconds = time_steps(args, device, sizes, steps_at, measured)

    def over_run(values) -> float:
        """The mean over the steps of the run of what is known at the measured widths."""
        points = [widths.hidden for widths in reversed(measured)]
        at_each = np.interp([widths.hidden for widths in steps_at], points, values[::-1])
        return np.average(at_each, weights=list(steps_at.values()))

    result = {"matrix_product_flops": np.median(rates), "batch_size": args.batch_size,
              "micro_batch_size": args.micro_batch_size, "seq_length": seq_length, "steps": args.steps,
              "repeats": args.repeats, "rows": []}
    times = {name: np.column_stack([each, [over_run(repeat) for repeat in each]]) for name, each in seconds.items()}
    rates = np.column_stack([rates, np.median(rates, axis=1)])
    times["ours"][:, -1] += cut_seconds / args.steps  # (repeats, widths and the run)
    for name in ("ours", "stock-best", "usual"):
        flops = [SYSTEMS[name].flops_per_token(config, seq_length, widths) for widths in measured]
        flops.append(over_run(flops))
        memory[name].append(max(memory[name]))
        for column, width in enumerate([*(widths.hidden for widths in measured), "run"]):
            speeds = args.batch_size * seq_length / times[name][:, column]
            row = {"shape": args.shape, "width": width, "system": name,
                   "tokens_per_second": np.median(speeds), "spread": [speeds.min(), speeds.max()],
                   "peak_memory": memory[name][column], "flops_per_token": flops[column],
                   "utilisation": np.median(speeds * flops[column] / rates[:, column])}
            if name != "ours":
                ratios = (times[name] / times["ours"])[:, column]
                row["ratio"] = [np.median(ratios), ratios.min(), ratios.max()]
            elif width == "run":
                row["cut_share"] = cut_seconds / args.steps / np.median(times[name][:, column])
            result["rows"].append(row)
    if cuda and args.shape == "base" and len(measured) >= 8:
        tokens = RECIPE.steps * RECIPE.batch_size * RECIPE.seq_length
        speed = next(row["tokens_per_second"] for row in result["rows"] if row["width"] == "run")
        result["recipe"] = {"tokens": tokens, "widths": [widths.hidden for widths in measured],
                            "hours": tokens / speed / 3600}
    return result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="The teacher; the target is half its width.")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bf16).")
    parser.add_argument("--quick", action="store_true", help="Three widths, not five (nine on CUDA); fewer repeats.")
    parser.add_argument("--repeats", type=int, help="Steps timed at each width. 3 if quick, else 5.")
    parser.add_argument("--batch-size", type=int, help="Sequences in a step. 8, 16 or 1024: base, small, CUDA.")
    parser.add_argument("--micro-batch-size", type=int, help="Sequences at a time. All; on CUDA 256.")
    parser.add_argument("--steps", type=int, help="Steps of the run that is averaged. The demonstration's, on CUDA the "
                        "published recipe's. Fewer steps make cuts weigh more.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of the CPU [%(default)s].")
    parser.add_argument("--json", type=Path, help="Where the result goes.")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    cuda = device.type == "cuda"
    args.repeats = args.repeats or (3 if args.quick else 5)
    args.batch_size = args.batch_size or (CUDA_BATCH if cuda else SHAPES[args.shape][2])
    args.micro_batch_size = args.micro_batch_size or (CUDA_MICRO_BATCH if cuda else args.batch_size)
    args.steps = args.steps or (RECIPE.steps if cuda else distill.DEMO["steps"])
    torch.set_num_threads(args.threads)
    result = header(argv, device) | measure(args, device)
    if args.json:
        write(args.json, result)
    print(f"matrix product: {result['matrix_product_flops'] / 1e9:,.0f} GFLOP/s")
    for row in result["rows"]:
        ratio = "ours is {:.2f} times as fast ({:.2f} to {:.2f})".format(*row["ratio"]) if "ratio" in row else ""
        share = f"cuts take {row['cut_share']:.2%} of the run" if "cut_share" in row else ""
        print(f"{row['shape']} {row['width']:>5} {row['system']:<10} {row['tokens_per_second']:>12,.0f} tokens/s "
              f"{row['utilisation']:>6.1%} {row['peak_memory']:>8,.0f} MB  {ratio}{share}")
    if "recipe" in result:
        print("the whole published recipe: {hours:.2f} hours".format(**result["recipe"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
