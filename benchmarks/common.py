"""What every benchmark needs: the program's own files on the path, a record of the machine, a way to keep results."""

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

RECIPE = distill.parse_arguments(["--teacher", "bert-base-uncased"])  # the published recipe: distill.py's own defaults


def header(argv: list[str], device: torch.device) -> dict:
    """Where, when, with what and how a result was measured."""
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        machine = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"machine": machine, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device.type,
            "versions": {"python": platform.python_version()} | versions,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *argv])}


def process() -> concurrent.futures.Executor:
    """A process of its own, for its memory. It is forked from a server that has only imported libraries: a process that
    is started afresh counts the peak of the one that started it as its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.bert.modeling_bert"])
    return concurrent.futures.ProcessPoolExecutor(1, context)


def alone(function, *arguments):
    """Call a function in a process of its own."""
    with process() as pool:
        return pool.submit(function, *arguments).result()


def write(path: Path, result: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
