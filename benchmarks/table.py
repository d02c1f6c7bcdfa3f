"""Print saved results as the Markdown tables of docs/performance.md.

    python benchmarks/table.py benchmarks/results/small-cpu.json [more results ...]
"""

import argparse
import json
import sys
from pathlib import Path


def throughput_table(result: dict) -> str:
    """A row for every width: speed of ours and of each peer with its ratio, utilisation, memory."""
    rows = {(row["width"], row["system"]): row for row in result["rows"]}
    peers = list(dict.fromkeys(system for _, system in rows if system != "ours"))
    heads = ["width", "ours, tokens/s", *(head for peer in peers for head in (f"{peer}, tokens/s", f"ours : {peer}")),
             "utilisation of ours", f"peak memory, MB: {' / '.join(['ours', *peers])}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for width in dict.fromkeys(width for width, _ in rows):
        ours, *others = (rows[width, system] for system in ("ours", *peers))
        cells = ["whole run" if width == "run" else str(width), f"{ours['tokens_per_second']:,.0f}"]
        for row in others:
            cells += [f"{row['tokens_per_second']:,.0f}", "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])]
        cells += [f"{100 * ours['utilisation']:.0f} %",
                  " / ".join(f"{row['peak_memory']:,.0f}" for row in (ours, *others))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"A large matmul: {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s. All prunes of a run of "
              f"{result['steps']:,} steps take {rows['run', 'ours']['prune_share']:.2%} of its time."]
    if "paper" in result:
        lines.append(f"A run with the paper's settings would take {result['paper']['hours']:.2f} hours.")
    return "\n".join(lines)


def tokenise_table(result: dict) -> str:
    lines = ["| copies of the corpus | tokens | tokens/s | peak memory, MB |", "|---|---|---|---|"]
    lines += ["| {copies} | {tokens:,} | {tokens_per_second:,.0f} | {peak_memory:,.0f} |".format(**size)
              for size in result["tokenise"]]
    fraction = result["batch_seconds"] / result["step_seconds"]
    return "\n".join([*lines, "", f"Making a batch takes {fraction:.2%} of the fastest training step."])


def fine_tuning_line(result: dict) -> str:
    return ("One epoch of {training_rows:,} rows of SST-2, batches of {batch_size}, {parameters:,} parameters: "
            "{seconds[ours]:,.0f} s; Trainer of `transformers`: {seconds[trainer]:,.0f} s. Ours takes "
            "{ratio[median]:.2f} ({ratio[least]:.2f} to {ratio[most]:.2f}) of its time.").format(**result)


KINDS = {"rows": throughput_table, "tokenise": tokenise_table, "ratio": fine_tuning_line}  # by a key of the result


def describe(result: dict) -> str:
    """The origin of a result, and its table. Raises StopIteration for a result that has none."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    origin = f"`{result['command']}`: {result['machine']}, {result['threads']} threads; {versions}; {result['date']}"
    return f"{origin}\n\n{next(KINDS[key] for key in KINDS if key in result)(result)}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that the benchmarks have written")
    for path in parser.parse_args(argv).results:
        print(describe(json.loads(path.read_text())), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
