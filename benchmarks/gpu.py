"""Everything that needs a GPU, within ten minutes: first check that the program computes correctly there, then time it.

    python benchmarks/gpu.py

Writes benchmarks/results/cuda-correctness.json and the results of throughput.py for both shapes. Exits with 1 if a
check fails, with 2 without a GPU.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import PAPER, RESULTS, ROOT, header, run_in_process, write
from safetensors.torch import load_file
from systems import build, random_batch

import prune
from support.metrics import spearman

LOSS_ERROR = 0.005  # relative, of every loss in bf16, whose numbers have eight bits; most errors average out
SENSITIVITY_ERROR = 0.05  # L1 distance of a group's sensitivities in bf16, relative to their sum
RANK_CORRELATION = 0.98  # of a group's units in both precisions; the ranking decides what is pruned
MEMORY_ERROR = 0.01  # relative, of the bytes that a prune must free
LARGE_MEMORY = 100e9  # bytes; from here on micro-batches of 256 rows fit the research code at the base shape, else 128


def require(truth, message: str):
    if not truth:
        raise SystemExit(f"gpu.py: check failed on this device: {message}")


def check_bf16(shape: str, device, system: str = "ours", pruned: bool = False) -> dict:
    """Compare losses and sensitivities of one batch in bf16, by the compiled step if `system` is "compiled", with those
    of the plain step in float32, with the whole student or with one `pruned` to its target shape. Returns the largest
    differences."""
    batch = random_batch(shape, 16, device)
    losses, sensitivities = [], []
    for name, bf16 in (("ours", False), (system, True)):
        ours = build(shape, [name], device, bf16)[name]
        if pruned:
            ours.prune_to(ours.target_shape, ours.lineage)
        values = ours.losses(batch)
        values["loss"].backward()
        ours.accumulate_sensitivity()
        losses.append({loss: value.item() for loss, value in values.items()})
        sensitivities.append(ours.sensitivity)
    pairs = [(sensitivities[0][group], sensitivities[1][group]) for group in sensitivities[0]]
    result = {"loss_error": max(abs(losses[1][name] / losses[0][name] - 1) for name in losses[0]),
              "sensitivity_error": max(((a - b).abs().sum() / a.sum()).item() for a, b in pairs),
              "rank_correlation": min(spearman(a.cpu().numpy(), b.cpu().numpy()) for a, b in pairs)}
    require(result["loss_error"] < LOSS_ERROR, f"losses in bf16: {result}")
    require(result["sensitivity_error"] < SENSITIVITY_ERROR, f"sensitivities in bf16: {result}")
    require(result["rank_correlation"] > RANK_CORRELATION, f"rankings in bf16: {result}")
    return result


def check_prune(shape: str, device):
    """Pruning the same units on the device and on the CPU leaves exactly the same tensors."""
    ours = build(shape, ["ours"], device, bf16=False)["ours"]
    ours.step([random_batch(shape, 2, device)])
    copies = []
    for where in (device, torch.device("cpu")):
        other = build(shape, ["ours"], where, bf16=False)["ours"]
        other.distiller.load_state_dict(ours.distiller.state_dict())
        other.optimizer.load_state_dict(ours.optimizer.state_dict())
        other.sensitivity = {group: values.to(where, copy=True) for group, values in ours.sensitivity.items()}
        other.prune_to(other.target_shape, other.sensitivity)
        moments = [state[key] for state in other.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        copies.append([*other.distiller.parameters(), *moments, *other.sensitivity.values(), *other.lineage.values()])
    require(all(torch.equal(a.cpu(), b) for a, b in zip(*copies, strict=True)), "a prune differs from the CPU's")


def check_memory(shape: str, device) -> list[dict]:
    """Every prune frees 12 bytes per pruned parameter (weight and two moments) and per pruned unit (sensitivity and
    teacher index)."""
    ours = build(shape, ["ours"], device, bf16=True)["ours"]
    batches = [random_batch(shape, 16, device)]
    teacher_shape, measured = ours.shape, []
    for step in range(10):
        new_shape = prune.scheduled_shape(step, 0, 9, teacher_shape, ours.target_shape, PAPER.granularity)
        if new_shape != ours.shape:
            ours.prune_to(new_shape, ours.sensitivity)
        ours.step(batches)
        parameters, units = (sum(t.numel() for t in tensors)
                             for tensors in (ours.distiller.parameters(), ours.lineage.values()))
        measured.append({
            "hidden_size": new_shape.hidden_size, "parameters": parameters, "needed": 12 * (parameters + units),
            "allocated": torch.cuda.memory_allocated(device),
            "requested": torch.cuda.memory_stats(device)["requested_bytes.all.current"]})  # before rounding up
    for before, after in itertools.pairwise(measured):
        expected, freed = (before[key] - after[key] for key in ("needed", "requested"))
        require(abs(freed - expected) <= MEMORY_ERROR * expected, f"a prune frees {freed} bytes, not {expected}")
        require(after["allocated"] < before["allocated"] or not expected, "a prune frees no allocated memory")
    return measured


def check_resume(folder: Path, flags: list[str]):
    """With --deterministic two runs of distill.py produce the same student bit for bit, and so does a run that SIGTERM
    interrupts after a few steps and that is resumed."""
    program, students = [sys.executable, str(ROOT / "distill.py")], []
    for name in ("first", "second", "interrupted"):
        output = ["--output", str(folder / name)]
        process = subprocess.Popen([*program, *flags, *output, "--deterministic", "--log-every", "1"])
        log = folder / name / "log.jsonl"
        if name == "interrupted":
            while process.poll() is None and not (log.is_file() and log.read_text().count('"train"') >= 5):
                time.sleep(0.02)
            process.terminate()
            require(process.wait() == 143, "SIGTERM does not save and stop a run")
            process = subprocess.Popen([*program, "--resume", *output])
        require(process.wait() == 0, f"distill.py: exit code {process.returncode}")
        students.append(load_file(folder / name / "student" / "model.safetensors"))
    for other, name in zip(students[1:], ("a second run", "a resumed run"), strict=True):
        require(all(torch.equal(tensor, other[key]) for key, tensor in students[0].items()),
                f"{name} produces another student")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder for the results.")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    result, path = header(argv, device), args.results / "cuda-correctness.json"
    result["bf16"] = {shape: check_bf16(shape, device) for shape in ("small", "base")}
    write(path, result)  # after each check, in case the machine is lost
    write(path, result := result | {"compiled": [run_in_process(check_bf16, "small", device, "compiled", pruned)
                                                 for pruned in (False, True)]})
    check_prune("small", device)
    write(path, result := result | {"prune": "as on the CPU"})
    write(path, result := result | {"memory": check_memory("small", device)})
    with tempfile.TemporaryDirectory() as folder:
        check_resume(Path(folder), ["--steps", "60", "--device", "cuda"])
    write(path, result | {"resume": "bit for bit"})
    print("all checks passed on this device:", result["bf16"])
    torch.cuda.empty_cache()  # leaves memory to the processes that follow
    micro = 256 if torch.cuda.get_device_properties(device).total_memory > LARGE_MEMORY else 128
    for shape in ("base", "small"):
        subprocess.run([sys.executable, str(Path(__file__).with_name("throughput.py")), "--shape", shape, "--device",
                        "cuda", "--quick", "--micro-batch-size", str(micro), "--json",
                        str(args.results / f"{shape}-cuda.json")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
