"""Devices and precision (support/distributed.py). See also reliability/: test_cuda.py, test_processes.py."""

import platform

import pytest
import torch
import torch.nn.functional as F

from support import distributed
from support.distributed import autocast, find_device, resolve_precision
from support.errors import LocalError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("machine, native, expected", [
    ("x86_64", (), "fp32"), ("x86_64", ("amd", "avx512"), "bf16"), ("x86_64", ("intel", "avx512", "amx"), "bf16"),
    ("x86_64", ("intel", "avx512"), "fp32"), ("x86_64", ("intel",), "fp32"), ("x86_64", ("arm",), "fp32"),
    ("aarch64", (), "fp32"), ("aarch64", ("arm",), "bf16"), ("arm64", ("arm",), "bf16")])
def test_auto_is_bf16_on_cpus_that_multiply_it_faster(monkeypatch, tmp_path, machine, native, expected):
    """Intel CPUs without AMX do not: the one measured reaches 167 GFLOP/s in bf16 and 333 in float32."""
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {'GenuineIntel' if 'intel' in native else 'AuthenticAMD'}")
    monkeypatch.setattr(distributed, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in native)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: "arm" in native)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32" and resolve_precision("bf16", CPU) == "bf16"


def test_an_arm_build_without_mkldnn_has_no_native_bf16(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve_precision("auto", CPU) == "fp32"


def test_this_cpu_is_asked_without_an_error():
    assert resolve_precision("auto", CPU) in ("fp32", "bf16")


@pytest.mark.parametrize("capability, expected", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_gpus_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", GPU) == expected and resolve_precision("bf16", GPU) == "bf16"


def test_attention_of_cudnn_is_off_on_a_gpu(monkeypatch):
    for name, answer in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert find_device("auto") == GPU and not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("world, local_rank, shared, expected", [
    (1, 0, False, 1), (8, 1, False, 1), (8, 3, True, 1), (8, 3, False, None)])
def test_processes_of_finetune_share_gpus_and_those_of_distill_do_not(monkeypatch, world, local_rank, shared, expected):
    """Two GPUs, and --device cuda:1. A single process takes the one that is named."""
    monkeypatch.setattr(distributed, "WORLD", world)
    monkeypatch.setattr(distributed, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if expected is None:
        with pytest.raises(LocalError, match="would need CUDA device 3, but there are 2"):
            find_device("cuda:1", shared)
    else:
        assert find_device("cuda:1", shared) == torch.device("cuda", expected)


def test_a_single_process_does_not_read_the_kept_units():
    """It would wait for the GPU. A tensor without memory cannot be read."""
    distributed.check_same_units(1, {"hidden": torch.empty(3, device="meta", dtype=torch.int64)})


def test_attention_in_bf16_on_a_cpu_agrees_with_torch():
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.arange(16).expand(2, 1, 1, 16) < torch.tensor([16, 9]).reshape(2, 1, 1, 1)  # 7 padding tokens
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    with autocast(CPU, bf16=True):
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.02)
        torch.manual_seed(0)
        dropped = F.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.5)[..., 0]
    assert dropped.std() > 0.2 and abs(dropped.mean() - 1) < 0.1  # without dropout all would be 1


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("device, bf16", [(CPU, False), (GPU, True)])
def test_attention_is_the_plain_one_in_fp32_on_a_gpu_and_afterwards(device, bf16):
    plain = F.scaled_dot_product_attention
    with autocast(device, bf16):
        assert F.scaled_dot_product_attention is plain and torch.get_autocast_dtype(device.type) == torch.bfloat16
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(InterruptedError), autocast(CPU, bf16=True):
        assert F.scaled_dot_product_attention is not plain
        raise InterruptedError
    assert F.scaled_dot_product_attention is plain
