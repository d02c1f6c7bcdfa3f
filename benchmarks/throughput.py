"""Tokens per second of a training step, compared with two versions of it made of stock `transformers` modules and, on
CUDA, with the compiled step of long runs.

    python benchmarks/throughput.py --shape small --device cpu --quick --precision fp32 --json small.json

The systems of systems.py make the same steps in alternation, each in its own process with the same allocator settings.
Before that their losses are checked to agree (those of the compiled step in gpu.py). Weights and tokens are random,
because the time of a step does not depend on them.

What the results mean:
    tokens_per_second   median over the repeats; `spread` is the smallest and the largest
    ratio               tokens/s of ours divided by those of a peer in the same repeat: median, smallest, largest
    utilisation         matmul work of the system per second (`flops_per_token`, without recomputation in the backward
                        pass), divided by the rate of a large matmul in the same repeat
    width "run"         a whole run: the time of a step at every width of the cubic schedule, interpolated between the
                        measured ones, and for ours the time of all prunes, each made and timed; `prune_share` of it
    peak_memory         MB of a process that runs only this system; on CUDA MB of tensors
"""

import argparse
import collections
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from common import PAPER, header, process, run_in_process, write
from systems import PEERS, SHAPES, SYSTEMS, build, check_all, random_batch, target

import distill
import prune
from prune import Shape
from support.distributed import find_device, peak_memory_mb, resolve_precision, synchronized_time, tune_malloc

CUDA_BATCH, CUDA_MICRO_BATCH = 1024, 256  # rows per step and per micro-batch


def matmul_rate(matrix: torch.Tensor) -> float:
    """Operations per second of a large matmul: the fastest of three timings, because a process that has just waited for
    others can be a third too slow at first."""
    count, seconds = 20 if matrix.is_cuda else 1, []
    for _ in range(3):
        start = synchronized_time(matrix.device)
        for _ in range(count):
            matrix @ matrix
        seconds.append(synchronized_time(matrix.device) - start)
    return count * 2 * len(matrix) ** 3 / min(seconds)


def schedule(args: argparse.Namespace, cuda: bool) -> tuple[dict[Shape, int], list[Shape]]:
    """The shapes of the projected run in order, with the number of steps at each; and those to measure, evenly spaced
    from the first to the last."""
    config = SHAPES[args.shape][0]
    first, last = Shape.of(config), target(config)
    steps_at = collections.Counter(
        prune.scheduled_shape(step, 0, PAPER.prune_end * args.steps, first, last, PAPER.granularity)
        for step in range(args.steps))
    wanted = np.linspace(first.hidden_size, last.hidden_size, 3 if args.quick else 9 if cuda else 5)
    measured = [min(steps_at, key=lambda shape: abs(shape.hidden_size - size)) for size in wanted[:-1]]  # noqa: B023
    return steps_at, list(dict.fromkeys([*measured, last]))  # a short schedule has fewer shapes


# ---- Called in the process of one system ---------------------------------------------------------------------

SYSTEM, BATCHES = [], []  # of this process


def start(name: str, shape: str, device, bf16: bool, threads: int, sizes: list[int]):
    """Build a system. All of them get the allocator settings of distill.py."""
    torch.set_num_threads(threads)
    tune_malloc()
    SYSTEM.append(build(shape, [name], device, bf16)[name])
    BATCHES.extend(random_batch(shape, rows, device) for rows in sizes)


def peak_memory(shapes: list[Shape], *system) -> list[float]:
    """MB that a system needs at each of the shapes. On the CPU give one at a time: a process's peak never falls."""
    start(*system)
    (running,), peaks = SYSTEM, []
    for new_shape in shapes:
        if new_shape != running.shape:
            running.prune_to(new_shape, prune.unit_importance("magnitude", {}, running.distiller.student, 0))
        peak_memory_mb(running.device)
        for _ in range(2):  # the first step creates Adam's moments
            running.step(BATCHES)
        peaks.append(peak_memory_mb(running.device))
    return peaks


def prune_ours(new_shape: Shape) -> tuple[float, dict[str, torch.Tensor]]:
    """The seconds that the prune took, and the teacher indices of the kept units. These are copied to the CPU, because
    torch refuses to pass on a CUDA tensor that came from another process."""
    seconds = SYSTEM[0].prune_to(new_shape, SYSTEM[0].sensitivity)
    return seconds, {group: indices.cpu() for group, indices in SYSTEM[0].lineage.items()}


def mask_peer(new_shape: Shape, lineage: dict[str, torch.Tensor]):
    SYSTEM[0].prune_to(new_shape, {group: indices.to(SYSTEM[0].device) for group, indices in lineage.items()})


def step_seconds() -> float:
    """Seconds of the second of two steps. The first one finds caches and clocks as other processes left them."""
    SYSTEM[0].step(BATCHES)
    begin = synchronized_time(SYSTEM[0].device)
    SYSTEM[0].step(BATCHES)
    return synchronized_time(SYSTEM[0].device) - begin


# ---- The measurements ----------------------------------------------------------------------------------------


def peak_memories(args: argparse.Namespace, device, sizes: list[int], measured: list[Shape]) -> dict[str, list[float]]:
    """System -> MB at each of the shapes `measured`. With masks everything keeps its full size."""
    cuda, bf16 = device.type == "cuda", args.precision == "bf16"

    def peaks(name: str, shapes: list[Shape]) -> list[float]:
        return run_in_process(peak_memory, shapes, name, args.shape, device, bf16, args.threads, sizes)

    masked = {name: peaks(name, measured[:1]) * len(measured) for name in PEERS}
    if cuda:
        return masked | {name: peaks(name, measured) for name in ("compiled", "ours")}
    return masked | {"ours": [peaks("ours", [shape])[0] for shape in measured]}


def time_steps(args: argparse.Namespace, device, sizes: list[int], steps_at: dict[Shape, int], measured: list[Shape],
               systems: list[str]):
    """Follow the schedule prune by prune. At the shapes `measured` time one step of each system in turn, and a matmul.

    Returns system -> seconds of a step (repeats, shapes), the rates of the matmul (repeats, shapes), and the seconds of
    all prunes.
    """
    bf16 = args.precision == "bf16"
    matrix = torch.randn(*2 * [8192 if device.type == "cuda" else 2048], device=device,
                         dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = {name: np.empty((args.repeats, len(measured))) for name in systems}
    rates, prune_seconds = np.empty((args.repeats, len(measured))), 0.0
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(process()) for name in systems}
        for name, pool in pools.items():
            pool.submit(start, name, args.shape, device, bf16, args.threads, sizes).result()
        shape = Shape.of(SHAPES[args.shape][0])
        for new_shape in steps_at:
            if new_shape != shape:
                for name in systems[len(PEERS) :]:  # ours is the last
                    took, lineage = pools[name].submit(prune_ours, new_shape).result()
                prune_seconds, shape = prune_seconds + took, new_shape
            if new_shape not in measured:
                continue
            column = measured.index(new_shape)
            for name in PEERS if column else ():
                pools[name].submit(mask_peer, new_shape, lineage).result()
            for repeat in range(args.repeats):
                for name, pool in pools.items():
                    seconds[name][repeat, column] = pool.submit(step_seconds).result()
                rates[repeat, column] = matmul_rate(matrix)
    return seconds, rates, prune_seconds


def measure(args: argparse.Namespace, device) -> dict:
    """All results of one teacher; on CUDA for BERT-base also `paper`, the hours of compiled steps with the paper's
    settings."""
    cuda = device.type == "cuda"
    config, seq_length, _ = SHAPES[args.shape]
    sizes = [min(args.micro_batch_size, args.batch_size - i) for i in range(0, args.batch_size, args.micro_batch_size)]
    steps_at, measured = schedule(args, cuda)
    check_all(args.shape, device)
    torch.cuda.empty_cache()  # leaves memory to the processes that follow
    memory = peak_memories(args, device, sizes, measured)
    seconds, rates, prune_seconds = time_steps(args, device, sizes, steps_at, measured, list(memory))

    def over_run(values) -> float:
        """The mean over the steps of the run of values at the measured shapes, interpolated between them."""
        points = [shape.hidden_size for shape in reversed(measured)]
        at_each = np.interp([shape.hidden_size for shape in steps_at], points, values[::-1])
        return np.average(at_each, weights=list(steps_at.values()))

    result = {"precision": args.precision, "matmul_flops_per_second": np.median(rates), "batch_size": args.batch_size,
              "micro_batch_size": args.micro_batch_size, "seq_length": seq_length, "steps": args.steps,
              "repeats": args.repeats, "rows": []}
    times = {name: np.column_stack([each, [over_run(repeat) for repeat in each]]) for name, each in seconds.items()}
    rates = np.column_stack([rates, [over_run(repeat) for repeat in rates]])  # (repeats, shapes and the run)
    for name in times.keys() - PEERS:
        times[name][:, -1] += prune_seconds / args.steps
    for name in times:
        flops = [SYSTEMS[name].flops_per_token(config, seq_length, shape) for shape in measured]
        flops.append(over_run(flops))
        memory[name].append(max(memory[name]))
        for column, width in enumerate([*(shape.hidden_size for shape in measured), "run"]):
            speeds = args.batch_size * seq_length / times[name][:, column]
            row = {"shape": args.shape, "width": width, "system": name,
                   "tokens_per_second": np.median(speeds), "spread": [speeds.min(), speeds.max()],
                   "peak_memory": memory[name][column], "flops_per_token": flops[column],
                   "utilisation": np.median(speeds * flops[column] / rates[:, column])}
            if name != "ours":
                ratios = (times[name] / times["ours"])[:, column]
                row["ratio"] = [np.median(ratios), ratios.min(), ratios.max()]
            elif width == "run":
                row["prune_share"] = prune_seconds / args.steps / np.median(times[name][:, column])
            result["rows"].append(row)
    if cuda and args.shape == "base":
        tokens = PAPER.steps * PAPER.batch_size * PAPER.seq_length
        speed = next(row["tokens_per_second"] for row in result["rows"]
                     if (row["system"], row["width"]) == ("compiled", "run"))
        result["paper"] = {"tokens": tokens, "hours": tokens / speed / 3600}
    return result


def table(result: dict) -> str:
    """Markdown for docs/performance.md. A row for every width: speed, ratio to each peer, utilisation, memory."""
    rows = {(row["width"], row["system"]): row for row in result["rows"]}
    peers = list(dict.fromkeys(system for _, system in rows if system != "ours"))
    heads = ["width", "ours, tokens/s", *(head for peer in peers for head in (f"{peer}, tokens/s", f"ours : {peer}")),
             "utilisation of ours", f"peak memory, MB: {' / '.join(['ours', *peers])}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for width in dict.fromkeys(width for width, _ in rows):
        ours, *others = (rows[width, system] for system in ("ours", *peers))
        cells = ["whole run" if width == "run" else str(width), f"{ours['tokens_per_second']:,.0f}"]
        for row in others:
            cells += [f"{row['tokens_per_second']:,.0f}", "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])]
        cells += [f"{100 * ours['utilisation']:.0f} %",
                  " / ".join(f"{row['peak_memory']:,.0f}" for row in (ours, *others))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"A large matmul: {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s. "
              f"All prunes of {result['steps']:,} steps take {rows['run', 'ours']['prune_share']:.2%} of the run."]
    if "paper" in result:
        lines.append(f"A run with the paper's settings would take {result['paper']['hours']:.2f} hours.")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="The teacher; the target is half its width.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="Of all systems, and of "
                        "the matmul whose rate utilisation refers to. auto: bf16 where it is native and faster.")
    parser.add_argument("--quick", action="store_true", help="Three widths, not five (nine on CUDA); fewer repeats.")
    parser.add_argument("--repeats", type=int, help="Steps to time at each width. 3 with --quick, else 5.")
    parser.add_argument("--batch-size", type=int, help="Rows per step. 8 for base, 16 for small, 1024 on CUDA.")
    parser.add_argument("--micro-batch-size", type=int, help="Rows per micro-batch. All of them; 256 on CUDA.")
    parser.add_argument("--steps", type=int, help="Steps of the projected run. The demo's; on CUDA the paper's.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads. [%(default)s]")
    parser.add_argument("--json", type=Path, help="File for the result.")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    args.precision = resolve_precision(args.precision, device)
    cuda = device.type == "cuda"
    args.repeats = args.repeats or (3 if args.quick else 5)
    args.batch_size = args.batch_size or (CUDA_BATCH if cuda else SHAPES[args.shape][2])
    args.micro_batch_size = args.micro_batch_size or (CUDA_MICRO_BATCH if cuda else args.batch_size)
    args.steps = args.steps or (PAPER.steps if cuda else distill.PRESETS["demo"]["steps"])
    torch.set_num_threads(args.threads)
    result = header(argv, device) | measure(args, device)
    if args.json:
        write(args.json, result)
    print(f"All systems in {args.precision}.\n\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
