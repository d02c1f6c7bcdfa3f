"""What the benchmarks share: the import path, a record of the machine, processes of their own, saved results."""

import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import distill  # noqa: E402

PAPER = distill.parse_arguments(["--teacher", "bert-base-uncased"])  # the paper's settings, the defaults of distill.py


def header(argv: list[str], device: torch.device) -> dict:
    """Where, when and how a result was measured."""
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():  # on ARM it names no model
        machine = [*re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()), machine][0]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"machine": machine, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device.type,
            "versions": {"python": platform.python_version()} | versions,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *argv])}


def process() -> concurrent.futures.Executor:
    """A new process, to measure its peak memory. It is forked from a server that has only imported libraries, because a
    spawned process inherits the peak of the process that started it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.bert.modeling_bert"])
    return concurrent.futures.ProcessPoolExecutor(1, context)


def run_in_process(function, *arguments):
    """Call a function in a new process."""
    with process() as pool:
        return pool.submit(function, *arguments).result()


def write(path: Path, result: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
