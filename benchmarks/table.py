"""Writes what benchmarks/results/*.json hold into the README, between its two marks.

    python benchmarks/table.py            write
    python benchmarks/table.py --check    exit 1 if the README says anything else
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def throughput_table(result: dict) -> str:
    """A line for every width: ours, each peer with the ratio and its spread, utilisation, memory."""
    rows = {(row["width"], row["system"]): row for row in result["rows"]}
    lines = ["| width | ours, tokens/s | stock-best | ours : stock-best | usual | ours : usual "
             "| utilisation of ours | peak memory, MB: ours / stock-best / usual |", "|---" * 8 + "|"]
    for width in dict.fromkeys(width for width, _ in rows):
        ours, *peers = (rows[width, name] for name in ("ours", "stock-best", "usual"))
        cells = ["whole run" if width == "run" else str(width), f"{ours['tokens_per_second']:,.0f}"]
        for peer in peers:
            cells += [f"{peer['tokens_per_second']:,.0f}", "{:.2f} ({:.2f} to {:.2f})".format(*peer["ratio"])]
        cells += [f"{ours['utilisation']:.0%}", " / ".join(f"{row['peak_memory']:,.0f}" for row in (ours, *peers))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"A large matrix product: {result['matrix_product_flops'] / 1e9:,.0f} GFLOP/s. All cuts of a run of "
              f"{result['steps']:,} steps: {rows['run', 'ours']['cut_share']:.2%} of its time."]
    if "recipe" in result:
        lines.append(f"The whole published recipe at these speeds: {result['recipe']['hours']:.2f} hours.")
    return "\n".join(lines)


def tokenise_table(result: dict) -> str:
    lines = ["| corpus | tokens | tokens/s | peak memory, MB |", "|---|---|---|---|"]
    lines += ["| {copies} x | {tokens:,} | {tokens_per_second:,.0f} | {peak_memory:,.0f} |".format(**size)
              for size in result["tokenise"]]
    share = result["batch_seconds"] / result["step_seconds"]
    return "\n".join([*lines, "", f"Making a training batch takes {share:.2%} of the fastest step of the small shape."])


def fine_tuning_table(result: dict) -> str:
    return ("One epoch of {training_rows:,} rows of SST-2, batches of {batch_size}, {parameters:,} parameters: "
            "{seconds[ours]:,.0f} s, with the Trainer of `transformers` {seconds[trainer]:,.0f} s; in turns, ours "
            "takes {ratio[median]:.2f} ({ratio[least]:.2f} to {ratio[most]:.2f}) of its time.").format(**result)


def tricks_table(result: dict) -> str:
    lines = ["| trick | width | a step is faster by | first step |", "|---|---|---|---|"]
    lines += ["| {trick} | {width} | {0:+.1f} % ({1:+.1f} to {2:+.1f}) | {first:.1f} s |".format(*row["gain"], **row)
              for row in result["tricks"]]
    return "\n".join(lines)


KINDS = {"rows": throughput_table, "tokenise": tokenise_table, "ratio": fine_tuning_table,
         "tricks": tricks_table}  # by a key of the result


def tables(folder: Path) -> str:
    """Markdown of all results in a folder, in order of name; results of other kinds are passed over."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        kind = next((KINDS[key] for key in KINDS if key in result), None)
        if kind is None:
            continue
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        threads = f", {result['threads']} thread{'s' * (result['threads'] > 1)}" if result["device"] == "cpu" else ""
        parts.append(f"`{result['command']}`: {result['machine']}{threads}; {versions}; {result['date']}")
        parts.append(kind(result))
    return "\n\n".join(parts)


def insert(readme: str, text: str) -> str:
    """The README with `text` between the marks. ValueError where they are not there once each, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f"the README must hold {BEGIN} and, after it, {END}, once each")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit 1 if the README is out of date.")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    old = args.readme.read_text(encoding="utf-8")
    try:
        new = insert(old, tables(args.results))
    except ValueError as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return 1
    if args.check and new != old:
        print("table.py: the README is out of date: run python benchmarks/table.py", file=sys.stderr)
        return 1
    if not args.check:
        args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
