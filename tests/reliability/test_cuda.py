"""distill.py and finetune.py on CUDA tensors that do not exist, to see that every tensor is on the right device.

FakeTensorMode computes shapes, dtypes and devices but no numbers, and raises where tensors of two devices meet. The CPU
build of torch only has to believe that there is a GPU. It cannot be talked out of that again, so the test starts this
file as a program of its own, which runs all cases and prints the error of each.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from made_up_tasks import write_glue
from test_session import Runs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import data
import distill
import finetune
import prune
from extensions import align_heads, compensate
from model import Bert
from support import checkpoint as checkpoint_files
from support import run_folder, session

TORCH = "2.13"  # For another version compare the numbers in `pretend_cuda` with its C++ headers
needs_torch = pytest.mark.skipif(not torch.__version__.startswith(f"{TORCH}."), reason=f"written for torch {TORCH}")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="needs Linux and no GPU")
aten = torch.ops.aten


def test_these_tests_are_for_the_required_version_of_torch():
    """Otherwise they would be skipped everywhere."""
    assert f"torch=={TORCH}." in (ROOT / "requirements.txt").read_text()


# ---- A GPU that does not exist -------------------------------------------------------------------------------


def pretend_cuda():
    """Make C++ and Python believe that there is one CUDA device, on which nothing can be computed."""
    functions = [ctypes.CFUNCTYPE(ctypes.c_longlong)(lambda value=value: value) for value in (0, 1)]
    zero, one = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    libraries = Path(torch.__file__).parent / "lib"
    # The device guard. Torch replaces one that counts no devices by one that does nothing.
    registry = "_ZN3c104impl26device_guard_impl_registryE"  # by device type: CPU, CUDA, ...
    guard_methods = (ctypes.c_void_p * 64)(*[zero] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(guard_methods))
    (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(libraries / "libc10.so")), registry)[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    # CUDAHooksInterface, which autograd asks. Its first word is the address of its methods.
    get_hooks = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())
    methods = (ctypes.c_void_p * 96).from_buffer_copy((ctypes.c_void_p * 96).from_address(hooks.value))
    methods[2:7] = [one] * 5  # isBuilt, isAvailable, hasPrimaryContext, init, deviceCount
    methods[7:11] = [zero] * 4  # setCurrentDevice, getCurrentDevice, exchangeDevice, maybeExchangeDevice
    hooks.value = ctypes.addressof(methods)
    torch.cuda.kept = functions, guard_methods, guard, methods  # C++ has their addresses
    for name, answer in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
            "is_bf16_supported": True, "mem_get_info": (10**10, 10**10), "max_memory_allocated": 0,
            "set_device": None, "synchronize": None, "manual_seed_all": None, "reset_peak_memory_stats": None}.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


class FakeGPU(FakeTensorMode):
    """Also answers when the program reads a number, pins memory, and checks lists, as those of a fused optimizer."""

    pinned = 0  # tensors of this case so far

    def dispatch(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 0}.get(args[0].dtype, 1.0)
        if function is aten._pin_memory.default:
            FakeGPU.pinned += 1
            return args[0]
        listed = [t for values in args if isinstance(values, (list, tuple)) for t in values]
        if len({t.device for t in listed if isinstance(t, torch.Tensor)}) > 1:
            raise RuntimeError(f"{function}: tensors on more than one device")
        return super().dispatch(function, types, args, kwargs or {})


def prepare_for_fake_tensors():
    """Replace what reads or writes the memory of tensors."""
    FakeTensorMode.avoid_device_init = True  # it would ask torch.cuda.is_available()

    def real_tensors(load):
        def wrapped(*args):
            with _disable_current_modes():
                return load(*args)
        return wrapped

    def move(module, device):  # Module.to cannot replace fake parameters
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = torch.nn.Parameter(p.detach().to(device), p.requires_grad)
        return module

    def to_numpy(tensor):
        assert tensor.device.type == "cpu", "a device has no numpy arrays"
        return np.zeros(tensor.shape, np.float32)

    torch_load = real_tensors(functools.partial(torch.load, map_location="cpu", weights_only=True))
    torch.load = lambda stream, map_location, weights_only: moved(torch_load(stream), map_location)
    torch.save = lambda values, stream: None
    safetensors.torch.load_file = real_tensors(safetensors.torch.load_file)
    safetensors.torch.save = lambda *_, **__: b""
    torch.nn.Module.to = move
    FakeTensor.numpy = to_numpy


# ---- The cases -----------------------------------------------------------------------------------------------


def distill_run(*flags):
    """Two steps from width 32 to 16 that prune after the first, with the paper's settings unless flags are given."""
    return lambda folder: distill.main([
        "--teacher", str(folder / "teacher"), "--corpus", str(folder / "text.txt"), "--cache-dir",
        str(folder / "cache"), "--target-width", "16", "--granularity", "16", "--steps", "2", "--batch-size", "4",
        "--seq-length", "16", "--eval-rows", "4", "--eval-every", "2", "--device", "cuda", "--output",
        str(folder / "run"), "--overwrite", *flags])


def resumed_run(folder: Path) -> int:
    shutil.copytree(folder / "interrupted", folder / "resumed", dirs_exist_ok=True)
    shutil.rmtree(folder / "resumed" / "student", ignore_errors=True)  # of an earlier case
    return distill.main(["--resume", "--output", str(folder / "resumed"), "--device", "cuda"])


def fine_tuning(folder: Path) -> int:
    return finetune.main(["--model", str(folder / "teacher"), "--task", "sst2", "--data", str(folder / "SST-2"),
                          "--epochs", "1", "--device", "cuda", "--output", str(folder / "tuned"), "--overwrite"])


CASES = {
    "the paper's settings": distill_run(),
    "everything": distill_run("--align-heads", "--compensate", "--eval-prunes", "--importance", "platon", "--dropout",
                              "0.1", "--alpha-mlm", "0", "--prune-start", "0.5", "--prune-end", "0.5",
                              "--batch-size", "8", "--micro-batch-size", "4", "--deterministic"),
    "random units": distill_run("--importance", "random", "--precision", "fp32", "--clip", "0", "--alpha-attn", "0",
                                "--steps", "1"),
    "a resumed run of the CPU": resumed_run,
    "fine-tuning": fine_tuning,
}


def moved(value, device: str | torch.device = "cpu"):
    """Tensors, and batches, lists and dictionaries of tensors, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, data.Batch):
        return data.Batch(*(moved(tensor, device) for tensor in vars(value).values()))
    if isinstance(value, dict):
        return {name: moved(each, device) for name, each in value.items()}
    return type(value)(moved(each, device) for each in value) if isinstance(value, (list, tuple)) else value


ONE_STEP = distill_run("--align-heads", "--compensate", "--alpha-attn", "0", "--steps", "1")
FAULTS = {  # the run that must fail, and the function whose result is on the CPU, or what replaces it
    "a batch": (ONE_STEP, data.Batch, "to", None),
    "a loss": (ONE_STEP, distill, "mean_mse", lambda *_: torch.zeros(1)),
    "the kept units": (ONE_STEP, prune, "choose_units", None),
    "aligned heads": (ONE_STEP, align_heads, "balancing_transforms", None),
    "a fit": (ONE_STEP, compensate.Place, "fit", None),
    "a checkpoint": (resumed_run, run_folder, "load_newest", None),
    "rows of a task": (fine_tuning, finetune, "make_batch", None),
}


def main(folder: Path):
    """Print the error of each case and of each fault as JSON."""
    pretend_cuda()
    prepare_for_fake_tensors()
    gc.disable()  # these three are for speed
    compensate.TOKENS_PER_UNIT = 1
    session.milliseconds_per_row = lambda *_: [0.0, 0.0]
    errors = {}

    def attempt(name: str, run):
        try:
            FakeGPU.pinned = 0
            with FakeGPU(allow_non_fake_inputs=True):
                code = run(folder)
            errors[name] = f"exit code {code}" if code else None if FakeGPU.pinned else "no tensor was pinned"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:400]

    for name, run in CASES.items():
        attempt(name, run)
    session.evaluate = lambda *_: {}
    for name, (run, owner, attribute, fault) in FAULTS.items():
        real = getattr(owner, attribute)
        setattr(owner, attribute, fault or (lambda *args, real=real, **kwargs: moved(real(*args, **kwargs))))
        attempt(name, run)
        setattr(owner, attribute, real)
    print(json.dumps(errors), flush=True)
    os._exit(0)  # autograd's threads for the device would never end


@pytest.fixture(scope="module")
def errors(tmp_path_factory, checkpoint, tokenizer, corpus) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "teacher").mkdir()
    config = dataclasses.replace(checkpoint_files.load_config(checkpoint), num_hidden_layers=1)  # for speed
    checkpoint_files.save_model(Bert(config), folder / "teacher")
    checkpoint_files.save_tokenizer(tokenizer, folder / "teacher", 64)
    (folder / "text.txt").write_text(corpus.read_text())
    write_glue("sst2", folder / "SST-2")
    Runs(folder / "teacher", folder / "text.txt", folder).killed(
        folder / "interrupted", 2, "--steps", 3, "--prune-start", 0.3, "--prune-end", 0.6, "--granularity", 8,
        "--batch-size", 4, "--eval-rows", 4, "--compensate")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_torch
@needs_no_gpu
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_on_the_right_device_and_batches_are_copied_from_pinned_memory(errors, case):
    assert errors[case] is None


@needs_torch
@needs_no_gpu
@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_on_the_wrong_device_is_found(errors, fault):
    assert errors[fault] and "device" in errors[fault]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
