"""Command lines. The types and the parser are shared by distill.py and finetune.py; the rest is for distill.py: the
flags that are not the method's own, presets, and the flags of a resumed run."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from support.errors import InputError
from support.run_folder import read_record


class Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        words = " ".join(sys.argv[1:] if args is None else args)
        if words.encode(errors="ignore").decode() != words:  # such a name can neither be printed nor recorded
            raise InputError("a file or folder name in the flags is not UTF-8: rename it")
        return super().parse_args(args, namespace)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def number(kind: type, low: float, high: float):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text: str):
        value = kind(text)  # argparse reports a ValueError
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Flag(NamedTuple):
    name: str
    default: object
    kind: object  # bool for a switch, list for one or more words, a tuple of choices, or an argparse type
    help: str  # plain sentences, with unit and reason


COUNT, NONNEGATIVE, FRACTION = number(int, 1, 10**9), number(float, 0, 1e9), number(float, 0, 1)
WIKIPEDIA = "hub:wikimedia/wikipedia:20231101.en"
DATA_FLAGS = (
    Flag("--teacher", None, str, "Folder or name on the Hugging Face Hub of the BERT to distil. Default: the "
         "preset's teacher; without one, the bundled teacher with --preset demo."),
    Flag("--corpus", [WIKIPEDIA], list, "Training text: .txt, .jsonl or .json with one object per line (all of "
         "these also as .gz), .parquet, folders of these, hub:OWNER/NAME:CONFIG, or demo, the documentation that comes "
         "with Python."),
    Flag("--text-column", ["text"], list, "Columns of .parquet and fields of .jsonl that hold the text. The "
         "texts of several columns are joined, one per line, into one document."),
    Flag("--corpus-tokens", None, number(int, 1, 10**15), "Stop reading the corpus after this many training tokens, "
         "or up to a block of 2 million characters later. Hub files are downloaded one by one until then. Default: the "
         "whole corpus."),
    Flag("--seq-length", 128, number(int, 8, 10**6), "Tokens per row."),
    Flag("--cache-dir", "~/.cache/homotopic-distillation", str, "Folder for tokenised text."),
)
RUN_FLAGS = (
    Flag("--output", None, Path, "Run folder for run.json, log.jsonl and student/. Default: runs/TEACHER-D, "
         "or runs/demo with --preset demo."),
    Flag("--keep-space", False, bool, "For sentence encoders: add a Dense layer, fitted by least squares on training "
         "text, that maps the student's vectors into the teacher's vector space, so that they can be searched in an "
         "index built with the teacher. Without it, sentence vectors have --target-width dimensions, unless the "
         "teacher has a Dense layer."),
    Flag("--overwrite", False, bool, "Replace the run in the output folder."),
    Flag("--resume", False, bool, "Resume the run in --output with its original flags, from its last checkpoint."),
    Flag("--save-minutes", 15.0, NONNEGATIVE, "Minutes between checkpoints."),
    Flag("--micro-batch-size", None, COUNT, "Rows that a process computes at a time; fewer need less memory. Another "
         "value draws other dropout and noise; otherwise results differ by rounding only. Default: what fits into half "
         "of the GPU's free memory, or of its total memory with --deterministic; at most 64 on a CPU."),
    Flag("--seed", 0, number(int, 0, 2**32 - 1), "Seed of everything random: row order, masks, dropout, noise."),
    Flag("--device", "auto", str, "cpu, cuda or cuda:N. auto uses a GPU if there is one."),
    Flag("--precision", "auto", ("auto", "fp32", "bf16"), "Precision of matmuls. auto is bf16 on GPUs "
         "and CPUs that multiply it natively and faster than fp32, else fp32."),
    Flag("--deterministic", False, bool, "Make runs on the same GPU reproducible bit for bit, at some cost. Runs on a "
         "CPU always are."),
)
EVALUATION_FLAGS = (
    Flag("--eval-every", None, COUNT, "Steps between evaluations on held-out text. Default: a tenth of the run."),
    Flag("--eval-rows", 1024, number(int, 2, 10**9), "Held-out rows per evaluation, or all if there are fewer."),
    Flag("--eval-prunes", False, bool, "Also evaluate right before and after every prune; written to log.jsonl."),
    Flag("--log-every", 10, COUNT, "Steps between lines in log.jsonl."),
)
MAY_CHANGE_ON_RESUME = {  # these change the student by rounding at most, except for other draws of dropout and noise
    "output", "resume", "save_minutes", "cache_dir", "eval_every", "eval_rows", "eval_prunes", "log_every",
    "micro_batch_size", "device", "teacher", "corpus"}  # the last two may have moved: Session compares their contents


def parse_flags(argv: list[str] | None, description: str, method_flags: tuple[Flag, ...],
                presets: dict[str, dict]) -> argparse.Namespace:
    """The flags of distill.py: the defaults, then those of the presets, then what is given; with --resume those that
    the run started with. Raises InputError."""
    groups = {"method": method_flags, "data": DATA_FLAGS, "run": RUN_FLAGS, "evaluation": EVALUATION_FLAGS}
    parser = Parser(usage="%(prog)s [flags]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description=f"{description} Defaults are in [brackets]. Those of the method are the paper's, "
                                "unless marked as our choice or our extension.")
    argv = sys.argv[1:] if argv is None else argv
    defaults = {"command": shlex.join(["python", "distill.py", *argv])}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            defaults[add_flag(group, flag).dest] = flag.default
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        return argparse.Namespace(**resumed_flags(given, set(defaults)))
    chosen = given.get("preset", [])
    if unknown := [name for name in chosen if name not in presets]:
        raise InputError(f"--preset {unknown[0]} is unknown: use one or more of {', '.join(presets)}")
    if "teacher" not in given and not any("teacher" in presets[name] for name in chosen):
        chosen = ["demo", *chosen]
    for name in chosen:
        defaults |= presets[name]
    return argparse.Namespace(**defaults | given | {"preset": chosen})


def add_flag(group, flag: Flag) -> argparse.Action:
    if isinstance(flag.kind, tuple):
        options = {"choices": flag.kind}
    else:
        options = {bool: {"action": "store_true"}, list: {"nargs": "+"}}.get(flag.kind, {"type": flag.kind})
    default = " ".join(flag.default) if flag.kind is list else flag.default
    hidden = default is None or default is False or default == ""
    return group.add_argument(flag.name, help=flag.help if hidden else f"{flag.help} [{default}]", **options)


def resumed_flags(given: dict, known: set[str]) -> dict:
    """The flags of the run in --output, updated with those given now that may differ. Raises InputError."""
    if "output" not in given or "overwrite" in given:
        raise InputError("--resume needs the folder of the run as --output, and excludes --overwrite")
    flags = read_record(given["output"]).get("flags", {})
    if set(flags) != known:
        raise InputError(f"--resume: {given['output'] / 'run.json'} was written by another version of this program")
    for name, value in given.items():
        # The recorded precision is what "auto" chose, and the preset demo may have been added to those given.
        implied = (name, value) == ("precision", "auto") or name == "preset" and ["demo", *value] == flags[name]
        if name not in MAY_CHANGE_ON_RESUME and value != flags[name] and not implied:
            raise InputError(f"--resume: --{name.replace('_', '-')} was {flags[name]} when the run started and is now "
                             f"{value}; that would change the student: leave the flag out")
    return flags | {name: value for name, value in given.items() if name in MAY_CHANGE_ON_RESUME}
