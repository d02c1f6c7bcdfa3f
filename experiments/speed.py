"""The encoder of a checkpoint as files for onnxruntime, and how long it takes there and in transformers."""

import statistics
import time
from pathlib import Path

import experiment
import export_onnx
import numpy as np
import onnxruntime
import torch
import transformers

from support.checkpoint import load_config
from support.files import model_fingerprint

ROWS, LENGTH = 16, 128
REPEATS = 9


def onnx_files(folder: Path) -> dict[str, Path]:
    """"float32" and "int8": the checkpoint in `folder`, without its masked-LM head."""
    files = {name: experiment.RUNS / "onnx" / model_fingerprint(folder) / f"{name}.onnx"
             for name in ("float32", "int8")}
    if not files["int8"].is_file():
        files["int8"].parent.mkdir(parents=True, exist_ok=True)
        student = export_onnx.Student(folder)
        student.bert.cls = None  # onnxruntime would compute the logits even if nobody asked for them
        export_onnx.export(student, files["float32"])
        export_onnx.quantize(files["float32"], unfinished := files["int8"].with_suffix(".unfinished"))
        unfinished.rename(files["int8"])
    return files


def run(session: onnxruntime.InferenceSession, output: str, *inputs) -> torch.Tensor:
    """One output for input_ids, attention_mask and token_type_ids (B,S)."""
    arrays = zip(export_onnx.INPUTS, (np.asarray(array, np.int64) for array in inputs), strict=True)
    return torch.from_numpy(session.run([output], dict(arrays))[0])


@torch.no_grad()
def milliseconds_per_row(models: dict[str, Path]) -> dict[str, dict[str, list[float]]]:
    """For every model and library the lower quartile, the median and the upper quartile of REPEATS batches of ROWS x
    LENGTH tokens, models and libraries in turn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    calls, times = {}, {}
    for arm, folder in models.items():
        ids, mask, types = export_onnx.example(load_config(folder), ROWS, LENGTH)
        mask = torch.ones_like(mask)
        bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        calls[arm, "transformers"] = lambda bert=bert, inputs=(ids, mask, types): bert(*inputs)
        for precision, path in onnx_files(folder).items():
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            calls[arm, f"onnxruntime {precision}"] = lambda session=session, inputs=(ids, mask, types): run(
                session, "last_hidden_state", *inputs)
    for _ in range(REPEATS + 1):  # the first is not counted
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times.setdefault(key, []).append((time.perf_counter() - start) * 1000 / ROWS)
    result: dict[str, dict[str, list[float]]] = {arm: {} for arm in models}
    for (arm, library), values in times.items():
        result[arm][library] = statistics.quantiles(values[1:])
    return result
