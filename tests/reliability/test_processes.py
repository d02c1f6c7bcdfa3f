"""distill.py as a program of its own: in a pipe, under signals, in several processes, and the demonstration."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_session import Runs, assert_close_student, assert_same_end, history

import distill
from support.run_folder import claimed, load_newest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(checkpoint, corpus, tmp_path_factory) -> Runs:
    """Small runs without dropout, whose random numbers depend on the number of processes."""
    runs = Runs(checkpoint, corpus, tmp_path_factory.mktemp("runs"))
    runs.flags += ["--dropout", "0"]
    return runs


def wait_for_steps(process, output, count: int):
    deadline = time.monotonic() + 60
    while len([line for line in (history(output) if (output / "log.jsonl").exists() else [])
               if line["event"] == "train"]) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


# ---- One process ---------------------------------------------------------------------------------------------


def test_in_a_pipe_it_prints_no_progress_bar_and_errors_go_to_stderr_with_exit_code_2(runs, tmp_path):
    command = [sys.executable, ROOT / "distill.py", *runs.flags, "--steps", "3", "--output", tmp_path / "run"]
    environment = ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout
    assert "teacher" in done.stdout and "milliseconds per row" in done.stdout
    done = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_line_that_says_how_to_resume(runs, tmp_path, number):
    process = subprocess.Popen([sys.executable, ROOT / "distill.py", *runs.flags, "--steps", "4000", "--output",
                                tmp_path / "run"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ONE_THREAD)
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number and re.match("\nsaving and stopping .*\n.*interrupted after .*\n$", error)
    message = re.search(r"interrupted after step (\d+), which is saved; to resume: python distill.py --resume", error)
    saved = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name[:15] for path in saved] == [f"step-{int(message[1]):010d}"]
    assert load_newest(saved[0].parent)["step"] == int(message[1])
    assert not (tmp_path / "run" / "student").exists()


def test_the_demonstration_trains_a_student_far_closer_than_pruning_alone(tmp_path):
    """With the bundled teacher and the demo text, against the same units pruned without any learning."""
    kl = []
    for rate in ("1e-3", "0"):
        output = tmp_path / rate
        assert distill.main([
            "--output", str(output), "--steps", "60", "--batch-size", "8", "--seq-length", "64", "--target-width",
            "192", "--corpus-tokens", "200000", "--learning-rate", rate, "--weight-decay", "0", "--eval-rows", "64",
            "--eval-every", "60", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")]) == 0
        kl.append([line for line in history(output) if line["event"] == "eval"][-1]["kl"])
    assert json.loads((tmp_path / "1e-3" / "student" / "config.json").read_text())["hidden_size"] == 192
    assert kl[0] < 0.6 * kl[1]


# ---- Several processes ---------------------------------------------------------------------------------------


def torchrun(count: int, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, f"--nproc-per-node={count}", *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, env=ONE_THREAD, cwd=ROOT)


def script(folder, *lines: str):
    """A program that runs distill.py after the lines."""
    path = folder / "script.py"
    path.write_text("\n".join(["import os, sys", f"sys.path.insert(0, {str(ROOT)!r})", "import distill, prune",
                               "from support import distributed", *lines]) + "\n")
    return path


@pytest.mark.parametrize("count, more", [(2, ()), (3, ("--micro-batch-size", 1)), (2, ("--alpha-hidn", 0))])
def test_several_processes_train_the_same_student(runs, tmp_path, count, more):
    """Three processes have 2 rows each, in micro-batches of 1. Without L_hidn one projection gets no gradient."""
    expected = runs.undisturbed(*more)
    done = torchrun(count, "distill.py", *runs.flags, "--output", tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KL to the teacher") == 1 and f"cpu and {count - 1} more" in done.stdout
    assert_close_student(tmp_path / "run", expected)
    for line, other in zip(history(tmp_path / "run"), history(expected), strict=True):
        assert line.pop("event") == other.pop("event")
        assert line == other if "before" in line else line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_the_variables_of_other_launchers_do_not_make_one_process_many():
    command = [sys.executable, "-c", "from support import distributed; print(distributed.RANK, distributed.WORLD)"]
    environment = {name: value for name, value in ONE_THREAD.items() if name != "MASTER_ADDR"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"RANK": "1", "WORLD_SIZE": "2"})
    assert done.stdout == "0 1\n", done.stderr


def test_the_process_group_is_closed_at_the_end(runs, tmp_path):
    program = script(tmp_path, "code = distill.main(sys.argv[1:])",
                     "sys.exit(code or distributed.dist.is_initialized())")
    done = torchrun(2, program, *runs.flags, "--output", tmp_path / "run")
    assert done.returncode == 0 and (tmp_path / "run" / "student").is_dir(), done.stderr


def test_several_processes_resume_bit_for_bit(runs, tmp_path):
    """Interrupted by a signal to torchrun, which passes it on."""
    flags = [*runs.flags, "--steps", "300", "--eval-every", "150", "--dropout", "0.1"]
    assert torchrun(2, "distill.py", *flags, "--output", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([*TORCHRUN, "--nproc-per-node=2", "distill.py", *flags, "--output", tmp_path / "run"],
                               cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ONE_THREAD)
    wait_for_steps(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (tmp_path / "run" / "student").exists() and list((tmp_path / "run" / "checkpoints").iterdir())
    done = torchrun(2, "distill.py", "--resume", "--output", tmp_path / "run")
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_may_be_resumed_with_another_number_of_processes(runs, tmp_path):
    runs.killed(tmp_path / "run", 3)
    done = torchrun(2, "distill.py", "--resume", "--output", tmp_path / "run")
    assert done.returncode == 0 and "resumed after step 3" in done.stdout, done.stderr
    assert_close_student(tmp_path / "run", runs.undisturbed())


def test_a_process_that_dies_ends_the_run(runs, tmp_path):
    program = script(
        tmp_path, "rate = distill.learning_rate",
        "def deadly(step, *rest):",
        "    return os._exit(9) if step == 3 and distributed.RANK == 1 else rate(step, *rest)",
        "distill.learning_rate = deadly", "sys.exit(distill.main(sys.argv[1:]))")
    start = time.monotonic()
    done = torchrun(2, program, *runs.flags, "--output", tmp_path / "run")
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert not (tmp_path / "run" / "student").exists()


def test_processes_that_choose_different_units_stop(runs, tmp_path):
    program = script(
        tmp_path, "choose = prune.choose_units",
        "def other(importance, *shapes):",
        "    return choose({k: -v for k, v in importance.items()} if distributed.RANK else importance, *shapes)",
        "prune.choose_units = other", "sys.exit(distill.main(sys.argv[1:]))")
    done = torchrun(2, program, *runs.flags, "--output", tmp_path / "run")
    assert done.returncode != 0 and "the processes chose different units to prune" in done.stderr


def test_a_folder_in_which_a_run_has_not_ended_is_refused_by_all_processes(runs, tmp_path):
    with claimed(tmp_path / "run"):
        done = torchrun(2, "distill.py", *runs.flags, "--output", tmp_path / "run")
    assert done.returncode != 0 and done.stderr.count("has not ended") == 1
    assert "RuntimeError" not in done.stderr and not (tmp_path / "run" / "run.json").exists()


def test_the_tensors_from_before_a_prune_are_freed_before_ddp_is_rebuilt(runs, tmp_path):
    """Without the cyclic collector, which would free them some day. A weak reference to a parameter lives as long as
    the parameter does in C++, where DistributedDataParallel has it."""
    program = script(
        tmp_path, "import gc, weakref", "gc.disable()", "old, prunes, prune_units = [], [], prune.prune_units",
        "def watched(model, *rest):",
        "    old.extend(map(weakref.ref, model.parameters()))",
        "    prune_units(model, *rest)",
        "    prunes.append(1)",
        "class Watched(distributed.DistributedDataParallel):",
        "    def __init__(self, module, **options):",
        "        new = set(map(id, module.parameters()))",
        "        alive = [p for p in (reference() for reference in old) if p is not None and id(p) not in new]",
        "        assert not alive, f'{len(alive)} tensors are alive'",
        "        super().__init__(module, **options)",
        "prune.prune_units, distributed.DistributedDataParallel = watched, Watched",
        "code = distill.main(sys.argv[1:])", "assert len(prunes) > 2", "sys.exit(code)")
    done = torchrun(2, program, *runs.flags, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr


def test_on_gpus_objects_are_exchanged_by_gloo(tmp_path):
    """A backend that delivers nothing stands in for NCCL."""
    program = tmp_path / "program.py"
    program.write_text("\n".join([
        "import sys", f"sys.path.insert(0, {str(ROOT)!r})", "import torch",
        "import torch.testing._internal.distributed.fake_pg",
        "from support import distributed",
        "connect = distributed.dist.init_process_group",
        "distributed.dist.init_process_group = lambda backend, **k: connect(backend.replace('nccl', 'fake'), **k)",
        "distributed.init_distributed(torch.device('cuda', 0))",
        "assert distributed.dist.distributed_c10d._get_object_coll_device() == 'cpu'",
        "assert distributed.all_gather_objects(f'from {distributed.RANK}') == ['from 0', 'from 1']",
        "distributed.dist.destroy_process_group()"]) + "\n")
    done = torchrun(2, program)
    assert done.returncode == 0, done.stderr
