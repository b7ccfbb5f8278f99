"""Configuration of an ECL ensemble: K timm encoders, each with a classification head."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# A configuration may come from a stranger's repository. These bounds lie far above every real model and keep a hostile
# one from filling the memory or calling parts of timm that read other files.
MAX_EXPERTS, MAX_CLASSES, MAX_IMAGE_SIDE, MAX_MODEL_ARGS = 64, 1_000_000, 8192, 32768
FORBIDDEN_MODEL_ARGS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"}
)


def _numbers(tree: Any) -> Iterator[float]:
    """All numbers in nested lists and dictionaries."""
    if isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _numbers(item)
    elif isinstance(tree, int | float):
        yield tree


@strict
class ECLConfig(PreTrainedConfig):
    """Describes what inference needs; nothing that exists only in training is part of it.

    Args:
        architecture: timm model name of every expert's encoder, with or without a weight tag.
        num_experts: number of experts K.
        share_stages: how many of the encoder's first stages, with its stem, are one for all experts.
        classifier: "linear" (weights and bias) or "cosine" (scaled cosine similarity plus bias).
        classifier_scale: scale of the cosine classifier; 16 for ImageNet-LT, 32 for iNaturalist (Sec. VI-C).
        class_counts: training images of each class, in label order; None if unknown.
        logit_prior: class prior that the raw logits carry. "uniform" for models trained with the balanced
            cross-entropy (Eq. 3), whose logits already suit a balanced test set; "train" for models trained with
            plain cross-entropy, whose logits carry the prior of `class_counts`.
        model_args: further keyword arguments for `timm.create_model`.
        pretrained_cfg: timm data configuration (input_size, mean, std, interpolation, crop_pct, crop_mode), which
            the image processor reads; the architecture's own when None.
        image_processor_type: image processor class that Auto classes and pipelines load.

    Raises:
        StrictDataclassError: a value has the wrong type or is out of range, or `class_counts` does not fit the labels.
        ValueError: more than 1,000,000 classes.
    """

    model_type = "ecl"

    architecture: str = "resnet32_cifar"
    num_experts: int = 3
    share_stages: int = 0
    classifier: Literal["linear", "cosine"] = "linear"
    classifier_scale: float | int = 16.0
    class_counts: list[int] | None = None
    logit_prior: Literal["uniform", "train"] = "uniform"
    model_args: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None
    image_processor_type: str = "TimmWrapperImageProcessor"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.class_counts is not None and self.id2label is None:
            kwargs.setdefault("num_labels", len(self.class_counts))
        if (num_labels := kwargs.get("num_labels") or 0) > MAX_CLASSES:  # before a name is made up for each
            raise ValueError(f"num_labels must be at most {MAX_CLASSES}, got {num_labels}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ECLConfig":
        """Build from saved values; other labels given as arguments replace all that is saved about the classes."""
        about_classes = ("num_labels", "id2label", "label2id", "class_counts")
        given = {key: kwargs.pop(key) for key in about_classes if key in kwargs}
        if {"num_labels", "id2label"} & given.keys():
            config_dict = {key: value for key, value in config_dict.items() if key not in about_classes}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def validate_num_experts(self) -> None:
        """At least one expert."""
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ValueError(f"num_experts must lie in 1..{MAX_EXPERTS}, got {self.num_experts}")

    def validate_share_stages(self) -> None:
        """No negative number; what the architecture allows is known when it is built."""
        if self.share_stages < 0:
            raise ValueError(f"share_stages must not be negative, got {self.share_stages}")

    def validate_model_args(self) -> None:
        """Arguments that shape the encoder, of a sane size; none that makes timm read a file."""
        if forbidden := sorted(FORBIDDEN_MODEL_ARGS & (self.model_args or {}).keys()):
            raise ValueError(f"model_args must not hold {', '.join(forbidden)}")
        if (total := sum(map(abs, _numbers(self.model_args)))) > MAX_MODEL_ARGS:
            raise ValueError(
                f"the numbers in model_args add up to {total}; more than {MAX_MODEL_ARGS} is no real model"
            )

    def validate_pretrained_cfg(self) -> None:
        """An image size that is one, and a mean and a positive standard deviation for each channel."""
        known = self.pretrained_cfg or {}
        size = known.get("input_size", (3, 32, 32))
        whole = isinstance(size, list | tuple) and len(size) == 3 and all(type(side) is int for side in size)
        if not whole or not all(1 <= side <= MAX_IMAGE_SIDE for side in size):
            raise ValueError(f"pretrained_cfg.input_size must be 3 numbers in 1..{MAX_IMAGE_SIDE}, got {size}")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = known.get(name, (1.0,))
            if not isinstance(values, list | tuple) or len(values) not in (1, size[0]):
                raise ValueError(
                    f"pretrained_cfg.{name} must hold a number for each of {size[0]} channels, got {values}"
                )
            if not all(isinstance(value, int | float) and least < value < math.inf for value in values):
                raise ValueError(f"pretrained_cfg.{name} holds a number out of range: {values}")
        crop = known.get("crop_pct", 1.0)
        if not isinstance(crop, int | float) or not 0.01 <= crop <= 2:
            raise ValueError(f"pretrained_cfg.crop_pct must lie in 0.01..2, got {crop}")

    def validate_classifier_scale(self) -> None:
        """A positive, finite scale."""
        if not 0 < self.classifier_scale < math.inf:
            raise ValueError(f"classifier_scale must be positive and finite, got {self.classifier_scale}")

    def validate_class_counts(self) -> None:
        """One non-negative count for each label, and at least one image in all."""
        if self.class_counts is None:
            if self.logit_prior == "train":
                raise ValueError("logit_prior='train' needs class_counts: the prior that the logits carry")
            return
        if not self.class_counts or len(self.class_counts) != self.num_labels:
            raise ValueError(f"class_counts has {len(self.class_counts)} entries, but num_labels is {self.num_labels}")
        if min(self.class_counts) < 0 or sum(self.class_counts) == 0:
            raise ValueError("class_counts must be non-negative and hold at least one image")


__all__ = ["ECLConfig"]
