"""Time one optimiser step of ECL, side by side with its floor and with the structure of NCL's published step.

    python benchmarks/training_step.py                                              # ResNet-32, 32 px, batch 64
    python benchmarks/training_step.py --architecture resnet50 --image_size 224 --batch_size 8

All are timed in turn, round after round, in one process; the table has medians and ratios of medians. Data lie on the
device, so that loading does not count.

- floor: forward and backward of K bare timm models and K forwards without gradient, which no method with a momentum
  branch can do without; channels-last, no loss worth the name, no optimiser.
- convolutions alone: those of the floor and nothing between them. No step in this precision can take less.
- ECL: everything else of a step too: losses, queues, moving averages, the look for bad numbers, SGD.
- bfloat16: with Accelerate's `--mixed_precision bf16`; compiled: with `train.compile`.
- as NCL's: the same work as ECL's (K networks, distillation of all pairs, a contrastive branch each), in the order of
  the published code: default memory format, a loop over pairs, one softmax after the other, a moving average parameter
  by parameter. Written for this comparison.
"""

import copy
import statistics
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import (
    Batch,
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ecl_hf.methods.ecl import ECLSettings
from ecl_hf.runs.folder import write_atomically

NESTED = "as NCL's"
LOSS = ECLSettings(sup_reduction="sum")


def nested_step(architecture: str, num_experts: int, num_classes: int, batch: Batch) -> Step:
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


def convolutions_step(architecture: str, num_experts: int, batch: Batch) -> Step:
    """The convolutions of the floor, and nothing between them."""
    model = timm.create_model(architecture, num_classes=0)
    model.to(batch["labels"].device, memory_format=torch.channels_last).train()
    layers = []

    def keep(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        layers.append((layer, inputs[0].detach(), torch.ones_like(output)))

    handles = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    model(batch["pixel_values"])
    for handle in handles:
        handle.remove()

    def step() -> None:
        for _ in range(num_experts):
            for number, (layer, pixels, gradient) in enumerate(layers):
                with torch.no_grad():
                    layer(pixels)
                layer(pixels.requires_grad_(number > 0)).backward(gradient)
                pixels.grad = None
        model.zero_grad()

    return step


def top_of_profile(step: Step, device: torch.device, steps: int = 5) -> str:
    """Where the time of a step is spent, by operation."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=45)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = new_parser("training_step.py", __doc__)
    add_sizes(parser, rounds=15)
    parser.add_argument("--compile", type=bool, default=True, help="Also time the compiled step")
    parser.add_argument("--bfloat16", type=bool, default=True, help="Also time mixed precision")
    parser.add_argument("--profile", type=Path | None, help="File for the operations of the eager step by their time")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    batch = made_up_batch(args.batch_size, args.image_size, args.num_classes, device)
    sizes = (args.architecture, args.num_experts, args.num_classes)
    steps = {
        "floor": floor_step(*sizes, batch),
        "convolutions alone": convolutions_step(args.architecture, args.num_experts, batch),
        "ECL": optimiser_step(build_task(*sizes, device), batch),
        NESTED: nested_step(*sizes, batch),
    }
    if args.bfloat16:
        task = build_task(*sizes, device)
        steps["ECL, bfloat16"] = optimiser_step(task, batch, torch.autocast(device.type, torch.bfloat16)(task.forward))
    if args.compile:
        compiled = build_task(*sizes, device)
        compiled.compile_encoders()
        steps["ECL, compiled"] = optimiser_step(compiled, batch)
    seconds = in_turn(steps, device, args.rounds, args.warmup)

    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = f"{args.batch_size / median:.0f}"
        against = (f"{ratio(values, seconds['floor']):.3f}", f"{ratio(seconds[NESTED], values):.2f}")
        rows.append((name, f"{1e3 * median:.0f}", speed, *against))
    text = table("step | ms | images/s | time / floor | images/s / as NCL's", rows)
    if args.profile:
        args.profile.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.profile, top_of_profile(steps["ECL"], device) + "\n")
    setting = {name: getattr(args, name) for name in ("architecture", "image_size", "batch_size", "num_experts")}
    results = {**setting, "num_classes": args.num_classes, "rounds": args.rounds, "seconds": seconds}
    name = f"training_step_{args.architecture}_{args.image_size}px"
    return finish(name, text, results, device, args.results_dir)


if __name__ == "__main__":
    main()
