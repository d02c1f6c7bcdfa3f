"""The student's model card: README.md with the metadata that the hub shows."""

import contextlib
from pathlib import Path

USAGE = {
    "sentence-transformers": """from sentence_transformers import SentenceTransformer
model = SentenceTransformer(".")  # this folder, or its name on the hub
vectors = model.encode(["The river is long.", "A bridge crosses the river."])
print(model.similarity(vectors, vectors))""",
    "transformers": """from transformers import pipeline
model = pipeline("TASK", ".")  # this folder, or its name on the hub
print(model(f"The river is {model.tokenizer.mask_token}."))""",
}
CARD = """---
{metadata}
---

# {name}, distilled to hidden size {width}

Made from its teacher by an implementation of HomoDistil (Liang et al., ICLR 2023), with the command below.
Quality on held-out text, ± the standard error:

```
{table}
```

## Usage

```python
{usage}
```

## Training

```
{command}
```

Versions: {versions}.
"""


def model_card(args, task: str, teacher_folder: Path, versions: dict[str, str], table: str) -> str:
    """The card of a student for `task`, the hub's pipeline tag. args: the flags of the run. Language and license are
    the teacher's, if its card states them; teacher and text are named if they are on the hub."""
    from huggingface_hub import ModelCardData, metadata_load  # after support/hub.py has set its environment

    known = {}
    with contextlib.suppress(Exception):  # no card, or one that is damaged, which does not concern the weights
        known = metadata_load(teacher_folder / "README.md") or {}
    library = "sentence-transformers" if task == "sentence-similarity" else "transformers"
    corpora = [corpus.removeprefix("hub:").partition(":")[0] for corpus in args.corpus if corpus.startswith("hub:")]
    data = ModelCardData(
        **{key: known.get(key) for key in ("language", "license", "license_name", "license_link")},
        base_model=None if Path(args.teacher).is_dir() else args.teacher, library_name=library, pipeline_tag=task,
        datasets=corpora or None, tags=["bert", "distillation", "pruning", "homodistil"])
    return CARD.format(
        metadata=data.to_yaml(), name=Path(args.teacher).resolve().name, width=args.target_width, table=table,
        usage=USAGE[library].replace("TASK", task), command=args.command,
        versions=", ".join(f"{name} {version}" for name, version in versions.items() if version))
