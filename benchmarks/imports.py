"""Time to import `ecl_hf`, side by side with the libraries that it is made of.

    python benchmarks/imports.py

Each import is made in a fresh process, in turn, round after round. `PreTrainedModel` is what every model of
transformers needs; `import transformers` by itself loads hardly anything.
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from measuring import finish, new_parser, ratio, table
from tqdm import tqdm

STATEMENTS = {
    "torch": "import torch",
    "timm, transformers": "import timm; from transformers import PreTrainedModel, AutoModelForImageClassification",
    "ecl_hf": "import ecl_hf",
}
TRAINING_ONLY = ("accelerate", "datasets", "jsonargparse", "matplotlib", "pandas", "sklearn", "torchmetrics")
CODE = """
import sys, time
started = time.perf_counter()
{}
print(time.perf_counter() - started, len(sys.modules), *(name for name in {} if name in sys.modules))
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = new_parser("imports.py", __doc__)
    parser.add_argument("--rounds", type=int, default=7, help="Timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="Rounds before them")
    args = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    modules, heavy = {}, {}
    for number in tqdm(range(args.warmup + args.rounds), "rounds", leave=False):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", CODE.format(statement, TRAINING_ONLY)]
            time, modules[name], *heavy[name] = subprocess.check_output(command, text=True).split()
            if number >= args.warmup:
                seconds[name].append(float(time))
    against = seconds["timm, transformers"]
    rows = []
    for name, values in seconds.items():
        more = set(heavy[name]) - set(heavy["timm, transformers"])  # which bring some of them along
        numbers = (f"{statistics.median(values):.2f}", f"{ratio(values, against):.3f}", modules[name])
        rows.append((name, *numbers, ", ".join(sorted(more)) or "none"))
    text = table("import | s | time / timm, transformers | modules | of training beyond theirs", rows)
    results = {"statements": STATEMENTS, "seconds": seconds, "modules": modules, "for_training": heavy}
    return finish("imports", text, results, torch.device(args.device), args.results_dir)


if __name__ == "__main__":
    main()
