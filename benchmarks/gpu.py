"""Everything that needs a GPU, in one go and within ten minutes: first that the program is right there, then how fast.

    python benchmarks/gpu.py

Writes benchmarks/results/cuda-correctness.json and, for both shapes, the results of throughput.py. Exit code 1 if
anything is not as it must be, 2 without a GPU.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RECIPE, RESULTS, ROOT, header, write
from safetensors.torch import load_file
from systems import build, random_batch

import prune

LOSS_ERROR = 0.005  # relative, of every loss in bf16: its numbers have eight bits, and most errors average out
SENSITIVITY_ERROR = 0.05  # L1 distance of a set's sensitivities in bf16, relative to their sum
RANK_CORRELATION = 0.98  # Spearman's, between the rankings of a set's units: what a cut depends on
MEMORY_ERROR = 0.01  # of the bytes that a cut must give back
LARGE_MEMORY = 100e9  # bytes: above, 256 sequences at a time fit the research code at the base shape, below 128


def require(truth, message: str):
    if not truth:
        raise SystemExit(f"gpu.py: wrong on this device: {message}")


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's: the correlation of the ranks."""
    return torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1].item()


def bf16_beside_float32(shape: str, device) -> dict:
    """Losses and unit sensitivities of one batch in both precisions. Returns the worst of each comparison."""
    batch = random_batch(shape, 16, device)
    losses, sensitivities = [], []
    for bf16 in (False, True):
        ours = build(shape, ["ours"], device, bf16)["ours"]
        values = ours.losses(batch)
        values["loss"].backward()
        ours.accumulate_sensitivity()
        losses.append({name: value.item() for name, value in values.items()})
        sensitivities.append(ours.sensitivity)
    pairs = [(sensitivities[0][units], sensitivities[1][units]) for units in sensitivities[0]]
    result = {"loss_error": max(abs(losses[1][name] / losses[0][name] - 1) for name in losses[0]),
              "sensitivity_error": max(((a - b).abs().sum() / a.sum()).item() for a, b in pairs),
              "rank_correlation": min(rank_correlation(a, b) for a, b in pairs)}
    require(result["loss_error"] < LOSS_ERROR, f"losses in bf16: {result}")
    require(result["sensitivity_error"] < SENSITIVITY_ERROR, f"sensitivities in bf16: {result}")
    require(result["rank_correlation"] > RANK_CORRELATION, f"rankings in bf16: {result}")
    return result


def cut_equals_cpu(shape: str, device):
    """The same units cut on the device and on the CPU leave exactly the same parameters, moments and sensitivities."""
    ours = build(shape, ["ours"], device, bf16=False)["ours"]
    ours.step([random_batch(shape, 2, device)])
    copies = []
    for where in (device, torch.device("cpu")):
        other = build(shape, ["ours"], where, bf16=False)["ours"]
        other.distiller.load_state_dict(ours.distiller.state_dict())
        other.optimizer.load_state_dict(ours.optimizer.state_dict())
        other.sensitivity = {units: values.to(where, copy=True) for units, values in ours.sensitivity.items()}
        other.narrow(other.last, other.sensitivity)
        moments = [state[key] for state in other.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        copies.append([*other.distiller.parameters(), *moments, *other.sensitivity.values(), *other.lineage.values()])
    require(all(torch.equal(a.cpu(), b) for a, b in zip(*copies, strict=True)), "a cut differs from the CPU's")


def memory_falls(shape: str, device) -> list[dict]:
    """After every cut the memory has fallen by 12 bytes for each parameter that went (weight and two moments) and for
    each unit (sensitivity and place in the lineage)."""
    ours = build(shape, ["ours"], device, bf16=True)["ours"]
    batches = [random_batch(shape, 16, device)]
    first, seen = ours.widths, []
    for step in range(10):
        new = prune.scheduled_widths(step, 0, 9, first, ours.last, RECIPE.granularity)
        if new != ours.widths:
            ours.narrow(new, ours.sensitivity)
        ours.step(batches)
        parameters, units = (sum(t.numel() for t in tensors)
                             for tensors in (ours.distiller.parameters(), ours.lineage.values()))
        seen.append({"hidden": new.hidden, "parameters": parameters, "needed": 12 * (parameters + units),
                     "allocated": torch.cuda.memory_allocated(device),
                     "requested": torch.cuda.memory_stats(device)["requested_bytes.all.current"]})  # before rounding up
    for before, after in itertools.pairwise(seen):
        expected, freed = (before[what] - after[what] for what in ("needed", "requested"))
        require(abs(freed - expected) <= MEMORY_ERROR * expected, f"a cut frees {freed} bytes, not {expected}")
        require(after["allocated"] < before["allocated"] or not expected, "a cut leaves as much memory allocated")
    return seen


def interrupted_ends_the_same(folder: Path, flags: list[str]):
    """With --deterministic two runs of distill.py end with the same bits, and so does one that SIGTERM has interrupted
    after a few steps and that was resumed."""
    program, students = [sys.executable, str(ROOT / "distill.py")], []
    for name in ("first", "second", "interrupted"):
        output = ["--output", str(folder / name)]
        process = subprocess.Popen([*program, *flags, *output, "--deterministic", "--log-every", "1"])
        log = folder / name / "log.jsonl"
        if name == "interrupted":
            while process.poll() is None and not (log.is_file() and log.read_text().count('"train"') >= 5):
                time.sleep(0.02)
            process.terminate()
            require(process.wait() == 143, "SIGTERM does not end a run as it should")
            process = subprocess.Popen([*program, "--resume", *output])
        require(process.wait() == 0, f"distill.py: exit code {process.returncode}")
        students.append(load_file(folder / name / "student" / "model.safetensors"))
    for other, what in zip(students[1:], ("a second run", "a resumed run"), strict=True):
        require(all(torch.equal(tensor, other[name]) for name, tensor in students[0].items()), f"{what} ends elsewhere")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder for the results.")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    result = header(argv, device) | {"bf16": {shape: bf16_beside_float32(shape, device) for shape in ("small", "base")}}
    cut_equals_cpu("small", device)
    result["memory"] = memory_falls("small", device)
    with tempfile.TemporaryDirectory() as folder:
        interrupted_ends_the_same(Path(folder), ["--steps", "60", "--device", "cuda"])
    write(args.results / "cuda-correctness.json", result)
    print("right on this device:", result["bf16"])
    torch.cuda.empty_cache()  # for the processes that follow
    micro = 256 if torch.cuda.get_device_properties(device).total_memory > LARGE_MEMORY else 128
    for shape in ("base", "small"):
        subprocess.run([sys.executable, str(Path(__file__).with_name("throughput.py")), "--shape", shape, "--device",
                        "cuda", "--micro-batch-size", str(micro), "--json", str(args.results / f"{shape}-cuda.json")],
                       check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
