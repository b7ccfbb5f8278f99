"""How time and memory of a training step grow with its sizes, and the time of an evaluation with its pictures.

    python benchmarks/growth.py

One size is changed at a time: pictures of a step B, experts K, classes C, keys of a queue Q. The last column is the
share of the step that distillation between all pairs takes (Eq. 5 to 8, forward and backward).
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from measuring import (
    Step,
    add_sizes,
    build_task,
    finish,
    floor_step,
    in_turn,
    made_up_batch,
    new_parser,
    optimiser_step,
    ratio,
    table,
)
from memory import in_fresh_process, peak_of_step

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.evidence.evaluation import predict, summarise
from ecl_hf.losses import feature_distillation, logit_distillation, transfer_weights

BATCH = 256


def distillation_step(num_experts: int, num_classes: int, labels: torch.Tensor, width: int) -> Step:
    """Both distillations between all pairs of experts, forward and backward."""
    shape = (num_experts, len(labels))
    logits = torch.randn(*shape, num_classes, device=labels.device, requires_grad=True)
    features = torch.randn(*shape, width, device=labels.device, requires_grad=True)
    references = torch.randn_like(logits)

    def step() -> None:
        weights = transfer_weights(references, logits, labels)
        loss = logit_distillation(logits, weights) + feature_distillation(features)
        torch.autograd.grad(loss, (logits, features))

    return step


def evaluation(args: Any, images: int, device: torch.device) -> Step:
    """From pictures on the device to all scores, without and with flip."""
    counts = [args.num_classes - c for c in range(args.num_classes)]
    config = ECLConfig(architecture=args.architecture, num_experts=args.num_experts, class_counts=counts)
    model = ECLForImageClassification(config).to(device, memory_format=torch.channels_last)
    batch = made_up_batch(min(BATCH, images), args.image_size, args.num_classes, device)
    batch = {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}

    def step() -> None:
        summarise(predict(model, (batch for _ in range(max(1, images // BATCH)))), counts)

    return step


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the results."""
    parser = new_parser("growth.py", __doc__)
    add_sizes(parser, rounds=5)
    parser.add_argument("--batch_sizes", type=list[int], default=[16, 64, 256])
    parser.add_argument("--experts", type=list[int], default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--classes", type=list[int], default=[10, 100, 1000, 8142])
    parser.add_argument("--queues", type=list[int], default=[1024, 8192, 65536])
    parser.add_argument("--test_images", type=list[int], default=[256, 1024, 4096])
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    base = {"B": args.batch_size, "K": args.num_experts, "C": args.num_classes, "Q": 1024}
    ranges = {"B": args.batch_sizes, "K": args.experts, "C": args.classes, "Q": args.queues}
    settings = [base | {name: value} for name, values in ranges.items() for value in values]
    settings = [s for i, s in enumerate(settings) if s not in settings[:i]]

    rows, results = [], []
    for setting in settings:
        batch = made_up_batch(setting["B"], args.image_size, setting["C"], device)
        sizes = (args.architecture, setting["K"], setting["C"])
        task = build_task(*sizes, device, setting["Q"])
        width = task.model.experts[0].head.in_features
        steps = {
            "floor": floor_step(*sizes, batch),
            "ECL": optimiser_step(task, batch),
            "distillation": distillation_step(setting["K"], setting["C"], batch["labels"], width),
        }
        seconds = in_turn(steps, device, args.rounds, args.warmup)
        peaks = [
            in_fresh_process(peak_of_step, *sizes, setting["B"], args.image_size, setting["Q"], mode, args.device)
            for mode in ("floor", "ECL")
        ]
        results.append({**setting, "seconds": seconds, "peak_bytes": peaks})
        median = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            (
                *setting.values(),
                f"{1e3 * median['ECL']:.0f}",
                f"{ratio(seconds['ECL'], seconds['floor']):.3f}",
                f"{peaks[1] / 2**20:.0f}",
                f"{peaks[1] / peaks[0]:.2f}",
                f"{1e3 * median['distillation']:.2f}",
                f"{100 * ratio(seconds['distillation'], seconds['ECL']):.1f}",
            )
        )
    header = "B | K | C | Q | ms | time / floor | MiB | memory / floor | distillation, ms | % of the step"
    text = [table(header, rows)]

    tests = {str(images): evaluation(args, images, device) for images in args.test_images}
    seconds = in_turn(tests, device, args.rounds, 1)
    rows = [
        (n, f"{1e3 * statistics.median(s):.0f}", f"{1e3 * statistics.median(s) / int(n):.2f}")
        for n, s in seconds.items()
    ]
    text.append(table("pictures tested, with flip | ms | ms / picture", rows))
    results = {"architecture": args.architecture, "image_size": args.image_size, "steps": results, "tests": seconds}
    return finish("growth", "\n\n".join(text), results, device, args.results_dir)


if __name__ == "__main__":
    main()
