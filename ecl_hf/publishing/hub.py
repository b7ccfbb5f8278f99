"""What goes to the Hub beside the weights: model cards, one expert as a plain timm model, ONNX files, uploads."""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from torch import Tensor, nn

from ecl_hf.configuration_ecl import ECLConfig
from ecl_hf.evidence.evaluation import percent
from ecl_hf.evidence.metrics import shot_groups
from ecl_hf.heads import ECLHead
from ecl_hf.modeling_ecl import ECLForImageClassification
from ecl_hf.names import printable
from ecl_hf.publishing.cards import fill
from ecl_hf.publishing.words import data_name, last_name, tested_epoch, tested_part
from ecl_hf.repository import explain_hub_errors, upload_directory

METRICS = {
    "balanced": ("balanced_accuracy", "Balanced accuracy, the mean of the classes' accuracies"),
    "top1": ("accuracy", "Top-1 accuracy"),
    "macro_f1": ("f1", "Macro F1, the mean of the classes' F1"),
    "many": ("accuracy", "Accuracy, classes with more than 100 training images"),
    "medium": ("accuracy", "Accuracy, classes with 20 to 100 training images"),
    "few": ("accuracy", "Accuracy, classes with fewer than 20 training images"),
    "ece": ("expected_calibration_error", "Expected calibration error, 15 bins"),
}


LEADERBOARD = ("balanced", "top1", "macro_f1")
"""Scores that also go into `.eval_results/`."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_dataset(results: dict[str, Any] | None, dataset: str | None) -> str | None:
    """Hub repository of the training data: the one that was named, or the recipe's if no local copy was read."""
    if dataset is None and results and not results["recipe"]["data"]["path"]:
        source = results["recipe"]["data"]["source"]
        return source if "/" in source else None
    return dataset


def best_expert(results: dict[str, Any] | None) -> int | None:
    """The expert with the best recorded top-1 without flip; None if nothing was recorded."""
    if results is None:
        return None
    scores = [expert["top1"] for expert in results["test"]["plain"]["experts"]]
    return max(range(len(scores)), key=scores.__getitem__)


def known_to_timm(architecture: str) -> bool:
    """Whether timm makes this encoder by itself; else `ecl_hf` must be imported before."""
    return timm.model_entrypoint(architecture).__module__.startswith("timm.")


def _eval_results(results: dict[str, Any], dataset: str | None, expert: int | None) -> list[EvalResult]:
    """The scores of the ensemble or of one expert without flip, in the Hub's form."""
    data, test = results["recipe"]["data"], results["test"]["plain"]
    name = data_name(data, dataset)
    scores = test["ensemble"] if expert is None else test["experts"][expert]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_split=None if data.get("test_fraction") else data["test_split"],
            metric_type=kind,
            metric_name=title,
            metric_value=round(scores[key], 4),
        )
        for key, (kind, title) in METRICS.items()
        if scores.get(key) is not None
    ]


def evaluation_entries(results: dict[str, Any], dataset: str, expert: int | None) -> list[dict[str, Any]]:
    """The same scores as entries of a file in `.eval_results/`, from which the Hub makes its leaderboards.

    A score appears on the leaderboard of the data set if that defines a task of the metric's name. There is none for a
    run that was not tested on the data set's own test split (`test_fraction`).

    Args:
        results: content of `results.json`.
        dataset: Hub repository of the data set.
        expert: position of the one expert that was scored; None for the ensemble.
    """
    data, experts = results["recipe"]["data"], len(results["test"]["plain"]["experts"])
    which = f"expert {expert}" if expert is not None else f"{experts} experts" if experts > 1 else "one network"
    profile = data["profile"]
    if profile != "as_is":
        profile += f", imbalance factor {data['imbalance_factor']:g}, split seed {data['split_seed']}"
    trained = f"trained on a long-tailed part ({profile}), tested on {tested_part(data)}"
    notes = f"{which}, no test-time flip; {trained} after {tested_epoch(results)}"
    entries = [
        EvalResultEntry(dataset, result.metric_type, result.metric_value, notes=notes)
        for result in _eval_results(results, dataset, expert)
        if result.metric_name in (METRICS[key][1] for key in LEADERBOARD)
    ]
    return eval_result_entries_to_yaml(entries)


def _rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The table of scores: ensemble and experts, without flip and with it (unless mirroring changes the class)."""
    kinds = ["plain", "flip"] if results["recipe"]["data"]["horizontal_flip"] else ["plain"]
    rows = []
    for kind in kinds:
        test = results["test"][kind]
        entries = [("ensemble", test["ensemble"])] if len(test["experts"]) > 1 else []
        entries += [(f"expert {k}", scores) for k, scores in enumerate(test["experts"])]
        for name, scores in entries:
            cells = {key: percent(scores[key]) if key in scores else "not measured" for key in METRICS}
            rows.append({"model": name, "flip": "yes" if kind == "flip" else "no", **cells})
    return rows


def model_card(
    template: Path,
    config: ECLConfig,
    results: dict[str, Any] | None,
    repo_id: str | None = None,
    *,
    dataset: str | None = None,
    license: str | None = None,
    plot: str | None = None,
    expert: int | None = None,
    examples: Sequence[str] = (),
) -> ModelCard:
    """Fill a template of `hub_cards/` with what the configuration and the results file say, and nothing else.

    Args:
        template: Jinja file.
        config: of the model.
        results: content of the run's `results.json`; None where nothing was measured.
        repo_id: repository that the examples name.
        dataset: Hub id of the training data; by default the recipe's source, if the run did not read a local copy.
        license: Hub identifier of the model's licence.
        plot: file name of the picture of the class counts, beside the card.
        expert: position of the one expert that the repository holds; None for the ensemble.
        examples: pictures in the repository, which its page offers to try.
    """
    recipe = results["recipe"] if results else None
    dataset = hub_dataset(results, dataset)
    pretrained = recipe["model"]["pretrained"] if recipe else False
    base_model = timm.get_pretrained_cfg(config.architecture).hf_hub_id if pretrained is True else None
    if isinstance(pretrained, str) and Path(pretrained).suffix not in (".safetensors", ".bin", ".pth", ".pt"):
        name = pretrained.removeprefix("hf-hub:")
        base_model = name if HUB_ID.fullmatch(name) else None  # else a directory of this machine
    metadata = ModelCardData(
        model_name=(repo_id or "ecl").split("/")[-1],
        license=license,
        library_name="transformers" if expert is None else "timm",
        pipeline_tag="image-classification",
        tags=["ecl", "long-tailed", "class-imbalance", "timm"],
        datasets=[dataset] if dataset else None,
        base_model=base_model,
        metrics=["balanced_accuracy", "accuracy"] if results else None,
        eval_results=_eval_results(results, dataset, expert) if results else None,
        widget=[{"src": src, "example_title": f"Example {n}"} for n, src in enumerate(examples, 1)] or None,
    )
    counts = config.class_counts
    names = [config.id2label[c] for c in range(config.num_labels)]
    if recipe:
        path = recipe["data"].get("path")
        recipe = {**recipe, "data": {**recipe["data"], "path": path and last_name(path)}}
    text = fill(
        template,
        card_data=metadata.to_yaml(),
        config=config,
        repo_id=repo_id or "REPOSITORY",
        results=results,
        rows=_rows(results) if results else None,
        test=results["test"] if results else None,
        data_name=data_name(recipe["data"], dataset) if recipe else None,
        tested_part=tested_part(recipe["data"]) if recipe else None,
        tested_epoch=tested_epoch(results) if results else None,
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else None,
        classes=list(zip(names, counts, strict=True)) if counts else None,
        groups={name: int(mask.sum()) for name, mask in shot_groups(counts).items()} if counts else None,
        license_name=license,
        weighted_on=config.weighted_on,
        plot=plot,
        expert=expert,
        best=best_expert(results),
        alone=bool(results) and len(results["test"]["plain"]["experts"]) == 1,
        percent=percent,
        registered_with_timm=known_to_timm(config.architecture),
    )
    return ModelCard(text)


def write_card(
    directory: Path, template: Path, config: ECLConfig, results: dict[str, Any] | None, **kwargs: Any
) -> None:
    """Write `README.md` (see `model_card`), what leaderboards read, and with matplotlib a picture of class counts."""
    plot = None
    if config.class_counts and kwargs.get("expert") is None and importlib.util.find_spec("matplotlib"):
        from ecl_hf.evidence.plots import plot_class_histogram
        from ecl_hf.evidence.plots.fonts import drawable, fonts_for

        plot = "class_counts.png"
        names = [printable(config.id2label[c]) for c in range(config.num_labels)]
        with fonts_for(names) as lost:
            plot_class_histogram(config.class_counts, drawable(names, lost)).savefig(directory / plot, dpi=150)
    model_card(template, config, results, plot=plot, **kwargs).save(directory / "README.md")
    dataset = hub_dataset(results, kwargs.get("dataset"))
    own_test = results and not results["recipe"]["data"].get("test_fraction")
    if own_test and dataset and HUB_ID.fullmatch(dataset):
        entries = evaluation_entries(results, dataset, kwargs.get("expert"))
        folder = directory / ".eval_results"
        folder.mkdir()
        text = yaml.safe_dump(entries, sort_keys=False)
        (folder / f"{dataset.split('/')[1]}.yaml").write_text(text, encoding="utf-8")


def save_timm(model: ECLForImageClassification, expert: int, directory: Path) -> None:
    """Write one expert as a plain timm model, which timm and stock transformers load without this package.

    A CIFAR ResNet is the exception: timm does not know it, so `import ecl_hf` must come first.

    Args:
        model: the ensemble.
        expert: position of the expert in `model`.
        directory: where to; it gets `config.json` and `model.safetensors`.

    Raises:
        ValueError: adapters, side branches, attention or the classifier have no counterpart in timm: it is not linear,
            or timm's has two heads.
    """
    chosen, config = model.experts[expert], model.config
    if config.adapter_rank:
        raise ValueError(
            "AdaptFormers have a ReLU between their layers, which merges into no weights: an encoder with them can't "
            "be a plain timm model. Publish it without --timm, or as --onnx; model.tune lora merges"
        )
    if config.side_branches:
        raise ValueError("timm's models have no side branches: an expert with one can't be one; --onnx takes it")
    if config.attention_map:
        raise ValueError(
            "timm's models have no attention before their pooling: an expert with one can't be one; --onnx takes it"
        )
    if type(chosen.head) is not ECLHead:
        kind = "layer before its classifier" if config.classifier_neck else f"{config.classifier} classifier"
        raise ValueError(f"timm's models have linear classifiers: an expert with a {kind} can't be one")
    plain = timm.create_model(config.architecture, num_classes=config.num_labels, **(config.model_args or {}))
    classifier = plain.pretrained_cfg["classifier"]
    if not isinstance(classifier, str) or type(plain.get_submodule(classifier)) is not nn.Linear:
        raise ValueError(f"{config.architecture} does not end in one linear classifier: no place for the expert's head")
    head = {"bias": torch.zeros(config.num_labels)} | chosen.head.state_dict()  # timm's always has a bias
    head = {name: tensor / config.temperature for name, tensor in head.items()}
    state = chosen.backbone.state_dict() | {f"{classifier}.{name}": tensor for name, tensor in head.items()}
    if model.trunk is not None:
        state |= model.trunk.backbone.state_dict()
    plain.load_state_dict(state, strict=True)
    plain.eval()
    image = torch.randn(2, *config.pretrained_cfg["input_size"])
    with torch.no_grad():
        if not torch.allclose(plain(image), model.float().eval()(image).expert_logits[:, expert], rtol=1e-3, atol=1e-3):
            raise ValueError(f"{config.architecture} treats features differently with a classifier: can't be exported")
    views = {key: tuple(v) if isinstance(v, list) else v for key, v in config.pretrained_cfg.items()}
    plain.pretrained_cfg = {**plain.pretrained_cfg, **views}
    timm.models.save_for_hf(
        plain,
        directory,
        model_config={"label_names": [config.id2label[c] for c in range(config.num_labels)]},
        model_args=config.model_args,
        safe_serialization=True,
    )
    file = Path(directory) / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    # Newer versions of timm write it here too, and transformers stumbles over the second
    written.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


class _Logits(nn.Module):
    def __init__(self, model: ECLForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def save_onnx(model: ECLForImageClassification, file: Path) -> float:
    """Write the ensemble's logits as an ONNX graph for any batch size, and run it.

    Args:
        model: all experts that the graph shall hold.
        file: to write; input `pixel_values` [B, 3, H, W], output `logits` [B, C].

    Returns:
        Largest difference between ONNX Runtime's logits and PyTorch's, over 3 random images.

    Raises:
        ImportError: the packages of the extra `onnx` are not installed.
        ValueError: ONNX Runtime computes other logits.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime reports each use to its makers
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx.export needs)
    except ImportError as error:
        raise ImportError("ONNX export needs pip install 'ecl-hf[onnx]'") from error
    model = model.float().eval()
    size = model.config.pretrained_cfg["input_size"]
    torch.onnx.export(
        _Logits(model).eval(),
        (torch.randn(2, *size),),
        file,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=sum(p.nbytes for p in model.parameters()) > 1e9,  # a single file holds two gigabytes
        verbose=False,
    )
    images = torch.randn(3, *size)
    with torch.no_grad():
        expected = model(images).logits
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    actual = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
    difference = (actual - expected).abs().max().item()
    if not difference <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise ValueError(f"ONNX Runtime's logits differ from PyTorch's by {difference:.2g}")
    return difference


def check_upload(repo_id: str, private: bool | None = None) -> None:
    """Make the repository if it is not there, so that a wrong name or token shows before hours of training.

    Raises:
        HfHubHTTPError: the Hub refused; the message says what to do.
    """
    with explain_hub_errors(repo_id):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


class BackgroundUpload:
    """Uploads a model now and then while training goes on; one upload at a time.

    Args:
        repo_id: Hub repository.
        report: is called with a sentence when an upload failed.
    """

    def __init__(self, repo_id: str, report: Callable[[str], None]) -> None:
        self.repo_id = repo_id
        self.report = report
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.running: Future | None = None

    def offer(self, model: ECLForImageClassification, add_card: Callable[[Path], None], message: str) -> None:
        """Copy the model as it is now and upload the copy, unless the upload before is still under way."""
        if self.running is not None and not self.running.done():
            self.report(f"not uploaded, since the upload before is still under way: {message}")
            return
        try:
            with ExitStack() as undo:
                directory = tempfile.TemporaryDirectory()
                undo.callback(directory.cleanup)
                add_card(Path(directory.name))
                model.save_pretrained(directory.name)
                undo.pop_all()
        except OSError as error:  # such as a full disk
            self.report(f"not uploaded, since the copy can't be written: {message}: {error}")
            return
        self.running = self.executor.submit(self._upload, directory, message)

    def wait(self) -> None:
        """Let the last upload end."""
        self.executor.shutdown()

    def _upload(self, directory: tempfile.TemporaryDirectory, message: str) -> None:
        with directory:
            try:
                upload_directory(directory.name, self.repo_id, commit_message=message)
            except Exception as error:  # whatever it is, training must go on
                self.report(f"the upload to {self.repo_id} failed ({message}), training goes on: {error}")
