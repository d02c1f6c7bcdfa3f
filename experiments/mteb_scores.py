"""Compare sentence encoders in MTEB, the Massive Text Embedding Benchmark. Needs a network and `pip install mteb`.

    python experiments/mteb_scores.py sentence-transformers/all-MiniLM-L6-v2 runs/minilm/student

prints the main score of every task, in percent. The default tasks cover similarity, search and classification; --tasks
names others, --benchmark a whole benchmark, such as "MTEB(eng, v2)", which takes hours."""

import argparse

import mteb
from sentence_transformers import SentenceTransformer

TASKS = ["STSBenchmark", "SICK-R", "SciFact", "NFCorpus", "Banking77Classification"]


def scores(encoder: str, tasks) -> dict[str, float]:
    """The main score of every task, in percent. Nothing is cached, because MTEB's cache confuses local folders."""
    results = mteb.evaluate(SentenceTransformer(encoder), tasks, cache=None)
    return {result.task_name: 100 * result.get_score() for result in results.task_results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", nargs="+", help="Sentence-transformers folders or hub names.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tasks", nargs="+", default=TASKS, help="Names of tasks.")
    what.add_argument("--benchmark", help="Name of a benchmark, in place of tasks.")
    args = parser.parse_args()
    try:
        tasks = mteb.get_benchmark(args.benchmark).tasks if args.benchmark else mteb.get_tasks(args.tasks)
    except KeyError as error:  # an unknown name
        parser.error(error.args[0])
    columns = [scores(encoder, tasks) for encoder in args.encoders]
    print("| task |", *(f"{encoder} |" for encoder in args.encoders))
    print("|---|" + "---|" * len(columns))
    for task in columns[0]:
        print(f"| {task} |", *(f"{column[task]:.1f} |" for column in columns))


if __name__ == "__main__":
    main()
