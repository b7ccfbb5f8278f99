"""Time one optimiser step of ECL, side by side with its floor and with the structure of NCL's published step.

    python benchmarks/training_step.py                                              # ResNet-32, 32 px, batch 64
    python benchmarks/training_step.py --architecture resnet50 --image_size 224 --batch_size 8

All are timed in turn, round after round, in one process; the table has medians and ratios of medians. Data lie on the
device, so that loading does not count.

- floor: forward and backward of K bare timm models and K forwards without gradient, which no method with a momentum
  branch can do without; channels-last, no loss worth the name, no optimiser.
- ECL: everything else of a step too: losses, queues, moving averages, SGD.
- as NCL's: the same work as ECL's (K networks, distillation of all pairs, a contrastive branch each), in the order of
  the published code: default memory format, a loop over pairs, one softmax after the other, a moving average parameter
  by parameter. Written for this comparison.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.collaborative import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.recipe import LossConfig
from ecl_hf.runs import describe_environment, write_atomically

NESTED = "as NCL's"
LOSS = LossConfig(sup_reduction="sum")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def floor_step(architecture: str, num_experts: int, num_classes: int, batch: dict[str, Tensor]) -> Callable[[], None]:
    """K bare models: forward and backward of one view, forward without gradient of the other."""
    device = batch["labels"].device
    models = [timm.create_model(architecture, num_classes=num_classes) for _ in range(num_experts)]
    models = [model.to(device, memory_format=torch.channels_last).train() for model in models]
    keys = [copy.deepcopy(model).requires_grad_(False) for model in models]

    def step() -> None:
        for model, key in zip(models, keys, strict=True):
            model(batch["pixel_values"]).mean().backward()
            model.zero_grad()
            with torch.no_grad():
                key(batch["contrast_pixel_values"])

    return step


def ecl_step(
    architecture: str, num_experts: int, num_classes: int, batch: dict[str, Tensor], compiled: bool
) -> Callable[[], None]:
    """What `training/train.py` does with a batch."""
    device = batch["labels"].device
    counts = [max(1, int(500 * 0.01 ** (c / max(1, num_classes - 1)))) for c in range(num_classes)]
    config = ECLConfig(architecture=architecture, num_experts=num_experts, class_counts=counts)
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["ecl"], LOSS)
    task.to(device, memory_format=torch.channels_last).train()
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-3, foreach=True)
    if compiled:
        task.compile()

    def step() -> None:
        out = task(**batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.enqueue(out["keys"])
        task.follow()

    return step


def nested_step(architecture: str, num_experts: int, num_classes: int, batch: dict[str, Tensor]) -> Callable[[], None]:
    """The structure of NCL's published training step, with ECL's amount of work."""
    device = batch["labels"].device
    batch = {name: tensor.contiguous() for name, tensor in batch.items()}
    labels, size, temperature = batch["labels"], LOSS.queue_size, LOSS.contrast_temperature

    def network() -> nn.ModuleDict:
        encoder = timm.create_model(architecture, num_classes=0)
        width = encoder.head_hidden_size
        projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, LOSS.projection_dim))
        heads = {"classifier": nn.Linear(width, num_classes), "projector": projector}
        return nn.ModuleDict({"encoder": encoder, **heads}).to(device).train()

    networks = [network() for _ in range(num_experts)]
    momenta = [copy.deepcopy(net).requires_grad_(False) for net in networks]
    queues = [F.normalize(torch.randn(LOSS.projection_dim, size, device=device), dim=0) for _ in networks]
    bias = torch.linspace(5, 0, num_classes, device=device)
    parameters = [p for net in networks for p in net.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-3, foreach=False)
    cursor = 0

    def step() -> None:
        nonlocal cursor
        features = [net["encoder"](batch["pixel_values"]) for net in networks]
        logits = [net["classifier"](feature) for net, feature in zip(networks, features, strict=True)]
        loss = sum(F.cross_entropy(z + bias, labels) for z in logits)
        hard = [
            (z - 1e3 * F.one_hot(labels, num_classes)).topk(max(1, int(0.3 * num_classes)), dim=1)[1] for z in logits
        ]
        for teacher, student in permutations(range(num_experts), 2):
            for scores in (logits, features, [z.gather(1, hard[0]) for z in logits]):
                target, guess = F.softmax(scores[teacher], dim=1), F.log_softmax(scores[student], dim=1)
                loss = loss + 0.6 * F.kl_div(guess, target, reduction="batchmean") / (num_experts - 1)
        keys = []
        for k, (net, momentum) in enumerate(zip(networks, momenta, strict=True)):
            query = F.normalize(net["projector"](features[k]), dim=1)
            with torch.no_grad():
                for slow, fast in zip(momentum.parameters(), net.parameters(), strict=True):
                    slow.data = slow.data * LOSS.key_momentum + fast.data * (1 - LOSS.key_momentum)
                keys.append(
                    F.normalize(momentum["projector"](momentum["encoder"](batch["contrast_pixel_values"])), dim=1)
                )
            positive = torch.einsum("nc,nc->n", query, keys[k])[:, None]
            negative = torch.einsum("nc,ck->nk", query, queues[k].clone())
            target = torch.zeros(len(query), dtype=torch.long, device=device)
            loss = loss + F.cross_entropy(torch.cat([positive, negative], dim=1) / temperature, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for queue, key in zip(queues, keys, strict=True):
            queue[:, cursor : cursor + len(key)] = key.T[:, : size - cursor]
        cursor = (cursor + len(labels)) % size

    return step


def measure(
    steps: dict[str, Callable[[], None]], device: torch.device, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each step in each round, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), "rounds", leave=False):
        for name, step in steps.items():
            synchronise(device)
            started = time.perf_counter()
            step()
            synchronise(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = ArgumentParser(prog="training_step.py", description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", type=str, default="resnet32_cifar", help="timm name of the encoders")
    parser.add_argument("--image_size", type=int, default=32, help="Side of the pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="Pictures of a step")
    parser.add_argument("--num_experts", type=int, default=3, help="K")
    parser.add_argument("--num_classes", type=int, default=100, help="C")
    parser.add_argument("--rounds", type=int, default=15, help="Timed rounds")
    parser.add_argument("--warmup", type=int, default=3, help="Rounds before them")
    parser.add_argument("--compile", type=bool, default=True, help="Also time the compiled step")
    parser.add_argument("--results_dir", type=Path | None, help="Directory for the JSON file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pictures = [torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device) for _ in range(2)]
    pixel_values, contrast = (p.contiguous(memory_format=torch.channels_last) for p in pictures)
    labels = torch.randint(args.num_classes, (args.batch_size,), device=device)
    batch = {"pixel_values": pixel_values, "labels": labels, "contrast_pixel_values": contrast}
    sizes = (args.architecture, args.num_experts, args.num_classes, batch)
    steps = {"floor": floor_step(*sizes), "ECL": ecl_step(*sizes, compiled=False), NESTED: nested_step(*sizes)}
    if args.compile:
        steps["ECL, compiled"] = ecl_step(*sizes, compiled=True)
    seconds = measure(steps, device, args.rounds, args.warmup)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    lines = ["| step | ms | images/s | time / floor | images/s / as NCL's |", "|---|---|---|---|---|"]
    for name, value in median.items():
        lines.append(
            f"| {name} | {1e3 * value:.0f} | {args.batch_size / value:.0f} | {value / median['floor']:.3f} "
            f"| {median[NESTED] / value:.2f} |"
        )
    print("\n".join(lines))
    setting = {name: getattr(args, name) for name in ("architecture", "image_size", "batch_size", "num_experts")}
    results = {
        **setting,
        "num_classes": args.num_classes,
        "rounds": args.rounds,
        "median_seconds": median,
        "seconds": seconds,
        "processor": platform.processor() or platform.machine(),
        **describe_environment(1, device),
    }
    if args.results_dir:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        file = args.results_dir / f"training_step_{args.architecture}_{args.image_size}px.json"
        write_atomically(file, json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
