"""A page to try a model in the browser: a Space of the Hub, or `python app.py` in its folder.

A Space is a folder with `app.py`, `requirements.txt`, `README.md`, the model in `model/`, and pictures in `examples/`.
"""

import csv
import io
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch
from huggingface_hub import CommitInfo, HfApi
from PIL import EpsImagePlugin, Image
from transformers import AutoImageProcessor

from ecl_hf.configuration_ecl import ECLConfig
from ecl_hf.data.pictures import check_size, content, defect
from ecl_hf.files import read_text
from ecl_hf.modeling_ecl import ECLForImageClassification
from ecl_hf.repository import explain_hub_errors

if TYPE_CHECKING:
    import gradio

TEMPLATES = Path(str(files("ecl_hf.hub_cards") / "space"))


MAX_FREQUENCIES = 1 << 22
"""Bytes of a file with class frequencies, which a visitor of the page may upload."""


class Classifier:
    """What the page asks of a model.

    Args:
        model: directory or Hub repository.
    """

    def __init__(self, model: str | Path) -> None:
        self.model = ECLForImageClassification.from_pretrained(model).eval()
        self.processor = AutoImageProcessor.from_pretrained(model)
        config = self.model.config
        self.names = [config.id2label[c] for c in range(config.num_labels)]
        self.counts = config.class_counts

    def prior(self, strength: float, file: str | None) -> list[float]:
        """Class frequencies, from a file or from a slider.

        Args:
            strength: 0 for equally common classes, 1 for those of the training pictures; between them, counts to
                this power.
            file: CSV with lines `class,frequency`; classes that it leaves out have frequency 0.

        Raises:
            ValueError: a class is unknown or named twice, or a frequency is no number from 0 up.
        """
        if file is not None:
            return self._read_prior(Path(file))
        return [max(count, 1) ** strength for count in self.counts or [1] * len(self.names)]

    def _read_prior(self, file: Path) -> list[float]:
        found: dict[str, float] = {}
        try:
            rows = list(csv.reader(io.StringIO(read_text(file, MAX_FREQUENCIES).removeprefix("\ufeff"), newline="")))
        except csv.Error as error:
            raise ValueError(f"{file.name} is no CSV file: {error}") from error
        for number, row in enumerate(rows, 1):
            if not row or (number == 1 and row == ["class", "frequency"]):
                continue
            name, frequency = (cell.strip() for cell in row) if len(row) == 2 else (None, "")
            try:
                value = float(frequency)
            except ValueError:
                value = -1.0
            if not 0 <= value < float("inf"):
                raise ValueError(f"line {number} of {file.name} must be a class and its frequency, 0 or more")
            if name not in self.names or name in found:
                raise ValueError(f"line {number} of {file.name}: {name!r} is no class of the model, or stands twice")
            found[name] = value
        if not sum(found.values()):
            raise ValueError(f"{file.name} gives no class a frequency above 0")
        return [found.get(name, 0.0) for name in self.names]

    @torch.no_grad()
    def classify(
        self, image: Image.Image, top_k: int = 5, flip: bool = False, target_prior: Sequence[float] | None = None
    ) -> tuple[dict[str, float], list[list[str]], float]:
        """Look at one picture.

        Args:
            image: of any mode.
            top_k: classes to name.
            flip: average the picture and its mirror image.
            target_prior: frequency of each class where the picture comes from, [C].

        Raises:
            ValueError: it is too large, or too long for its width.

        Returns:
            Probabilities of the best classes by name, best first; for each expert its number, best class and that
            class's probability; the experts' disagreement in nats.
        """
        check_size(image)
        pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        plain = self.model(pixels, flip=flip)
        output = plain if target_prior is None else self.model(pixels, flip=flip, target_prior=list(target_prior))
        best = output.logits[0].softmax(-1).topk(min(top_k, len(self.names)))
        scores = {self.names[c]: p for c, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        shift = torch.where(plain.logits.isfinite(), output.logits - plain.logits, 0.0)
        probabilities = (plain.expert_logits[0] + shift).softmax(-1)
        rows = []
        for k, (probability, c) in enumerate(zip(*probabilities.max(-1), strict=True)):
            rows.append([f"expert {k}", self.names[c], f"{100 * probability:.1f} %"])
        return scores, rows, plain.disagreement[0].item()


def build_app(folder: Path) -> "gradio.Blocks":
    """The page of a Space.

    Args:
        folder: of the Space.

    Raises:
        ImportError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the page needs pip install 'ecl-hf[space]'") from error
    EpsImagePlugin.gs_binary = False  # else Pillow, which gradio opens pictures with, starts Ghostscript for some
    classifier = Classifier(folder / "model")
    examples = sorted(str(path) for path in (folder / "examples").glob("*") if path.is_file())

    def answer(
        image: Image.Image | None, top_k: float, flip: bool, strength: float, file: str | None
    ) -> tuple[dict[str, float], list[list[str]], str]:
        if image is None:
            raise gr.Error("Choose a picture first.")
        try:
            prior = classifier.prior(strength, file)
            scores, rows, differ = classifier.classify(image, int(top_k), flip, prior)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        alone = len(rows) == 1
        return scores, rows, "" if alone else f"The experts differ by {differ:.3f} nats; 0 means that they agree."

    classes = len(classifier.names)
    with gr.Blocks(title="Long-tailed image classification") as app:
        gr.Markdown(
            f"# Long-tailed image classification\n\nShow the model a picture. It chooses among {classes} classes, and "
            "was trained to recognise the rare ones as well as the common ones."
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="Picture")
                top_k = gr.Slider(1, min(10, classes), min(5, classes), step=1, label="Classes to show")
                flip = gr.Checkbox(label="Look at the mirror image too")
                strength = gr.Slider(
                    0, 1, 0, step=0.05, visible=bool(classifier.counts),
                    label="How common are the classes? 0: all alike; 1: as in the training pictures",
                )  # fmt: skip
                file = gr.File(
                    label="Or their frequencies as CSV: class,frequency", file_types=[".csv"], type="filepath"
                )
                button = gr.Button("Classify", variant="primary")
            with gr.Column():
                label = gr.Label(label="Best classes")
                table = gr.Dataframe(
                    headers=["expert", "best class", "probability"], datatype="str", label="What each expert says"
                )
                differ = gr.Textbox(label="Disagreement", interactive=False)
        button.click(answer, [image, top_k, flip, strength, file], [label, table, differ], api_name="classify")
        if examples:
            gr.Examples(examples, image)
    return app


def write_space(folder: Path, model: ECLForImageClassification, title: str, examples: Sequence[Path]) -> None:
    """Write a Space into an empty directory.

    Args:
        folder: where to.
        model: all experts that the page shall ask.
        title: of the Space.
        examples: picture files that everybody may see.

    Raises:
        ValueError: a picture can't be read; the message names it.
    """
    config: ECLConfig = model.config
    counts = config.class_counts or [0]
    for file in TEMPLATES.iterdir():
        if file.name in ("app.py", "requirements.txt"):
            shutil.copyfile(file, folder / file.name)
    text = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    template = jinja2.Environment(keep_trailing_newline=True).from_string(text)
    card = template.render(title=title, classes=config.num_labels, most=max(counts), fewest=min(counts))
    (folder / "README.md").write_text(card, encoding="utf-8")
    model.save_pretrained(folder / "model")
    copy_examples(folder, examples)


def copy_examples(folder: Path, files: Sequence[Path]) -> list[str]:
    """Copy pictures into `examples/` of a folder, without their names; returns their new paths in the folder.

    Raises:
        ValueError: a picture can't be read; the message names it.
    """
    (folder / "examples").mkdir()
    copies = []
    for number, file in enumerate(files):
        try:
            picture = {"bytes": content({"bytes": None, "path": str(file)}), "path": None}  # as it is checked
        except (OSError, ValueError) as error:
            raise ValueError(f"example {file} can't be read: {error}") from error
        if reason := defect(picture):
            raise ValueError(f"example {file} is no picture that can be read: {reason}")
        copies.append(f"examples/{number}{file.suffix.lower()}")
        (folder / copies[-1]).write_bytes(picture["bytes"])
    return copies


def upload_space(directory: Path, repo_id: str, *, private: bool | None = None) -> CommitInfo:
    """Upload what `write_space` wrote as a Space, made if it is not there.

    Raises:
        HfHubHTTPError: the Hub refused; the message says what to do.
    """
    api = HfApi()
    with explain_hub_errors(repo_id):
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=directory, commit_message="Upload the page"
        )
