"""Devices and processes. torchrun starts the processes and DistributedDataParallel averages their gradients; the rest
of what several processes need is here. With a single process every function works and does next to nothing."""

import contextlib
import ctypes
import datetime
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.errors import InputError, LocalError

TORCHRUN = os.environ if "MASTER_ADDR" in os.environ else {}  # other launchers may set RANK and WORLD_SIZE, too
RANK, WORLD, LOCAL_RANK = (int(TORCHRUN.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
CPUINFO = Path("/proc/cpuinfo")  # of Linux


def find_device(name: str, shared: bool = False) -> torch.device:
    """The device named by --device. With several processes each takes its own GPU; if `shared`, several may take the
    same one. Raises InputError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", name):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        index, count = LOCAL_RANK if WORLD > 1 else device.index or 0, torch.cuda.device_count()
        if shared and WORLD > 1:
            index %= max(count, 1)
        device = torch.device("cuda", index)
        if index >= count:
            raise LocalError(f"--device {name}: process {RANK} would need CUDA device {index}, but there are {count} "
                             "CUDA devices here")
        torch.cuda.set_device(device)
        # Torch prefers cuDNN's attention on some GPUs. It makes a plan for every new (B,S), which takes half a second.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """--precision, where auto is bf16 on devices that multiply it natively and faster than fp32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs emulate it
    elif platform.machine() in ("arm64", "aarch64"):
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:  # Intel CPUs without AMX multiply bf16 at half the rate of fp32 (docs/performance.md)
        native = torch.cpu._is_amx_tile_supported() or (
            torch.cpu._is_avx512_bf16_supported() and "GenuineIntel" not in CPUINFO.read_text())
    return "bf16" if native else "fp32"


@contextlib.contextmanager
def autocast(device: torch.device, bf16: bool):
    """Compute matmuls in bf16 if wanted. On a CPU attention is then two matmuls and a softmax, because torch's fused
    kernel is several times as slow in bf16 (docs/performance.md)."""
    attention = F.scaled_dot_product_attention

    def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B,H,S,S)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout_p) @ value

    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        try:
            if bf16 and device.type == "cpu":
                F.scaled_dot_product_attention = plain_attention
            yield
        finally:
            F.scaled_dot_product_attention = attention


def tune_malloc():
    """Make glibc's malloc reuse freed memory instead of returning it to the system, which must clear every page of
    every large tensor again. This saves about a tenth of a step on the CPU. Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on the device. The program waits for copies to a GPU unless they are from pinned memory."""
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: on a GPU that of tensors since the last call, on the CPU that of this process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def synchronized_time(device: torch.device) -> float:
    """The time in seconds, read after the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def init_distributed(device: torch.device, timeout: datetime.timedelta = datetime.timedelta(minutes=10)):
    """Connect the processes that torchrun started. `timeout` limits each wait for the others; a process that dies is
    noticed at once."""
    if WORLD > 1:
        # With gloo beside nccl, Python objects are exchanged without the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)


def rank_slice(rows: int) -> tuple[int, int]:
    """First and last (exclusive) of the rows that this process takes, out of `rows`."""
    return rows * RANK // WORLD, rows * (RANK + 1) // WORLD


def all_gather_objects(value) -> list:
    """The value of every process, ordered by rank."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """The sum of every value over all processes."""
    gathered = all_gather_objects(values)
    return {name: sum(each[name] for each in gathered) for name in values}


def check_same_units(step: int, keep: dict[str, torch.Tensor]):
    """Raise InputError unless all processes keep the same units; otherwise their models would differ from here on."""
    if WORLD == 1:
        return  # reading the indices would make the GPU wait
    kept = {group: indices.tolist() for group, indices in keep.items()}
    if any(other != kept for other in all_gather_objects(kept)):
        raise InputError(f"step {step}: the processes chose different units to prune; run all of them on the same "
                         "hardware with the same versions")


def wrap_ddp(module: nn.Module, all_used: bool) -> nn.Module:
    """The module with its gradients averaged over all processes. Wrap it again after every prune, because DDP's
    buckets belong to the old parameters. all_used: every parameter gets a gradient in every step."""
    return DistributedDataParallel(module, find_unused_parameters=not all_used) if WORLD > 1 else module


def sync_only_if(module: nn.Module, last: bool):
    """A context in which backward passes average their gradients over the processes only if `last`."""
    return contextlib.nullcontext() if WORLD == 1 or last else module.no_sync()
