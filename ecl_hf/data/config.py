"""The recipe's section `data`."""

from dataclasses import dataclass
from typing import Literal

from ecl_hf.checks import check_values, require

MAX_PIXELS = 89_478_485
"""Pixels of a picture: above as many, Pillow suspects an attack; above twice as many it reads none."""


@dataclass(kw_only=True)
class DataConfig:
    """Pictures, and the long-tailed split made of them."""

    source: str = "uoft-cs/cifar100"
    """Data set: a Hub repository; a published list over your pictures in `path` (`imagenet_lt`, `places_lt`,
    `inaturalist2018`); or `digits` (scikit-learn's handwritten digits, no download)."""
    path: str | None = None
    """Local directory with the pictures, instead of the Hub's: class folders, parquet files train-*, test-*, or what
    else `datasets` reads."""
    subset: str | None = None
    """Subset of a Hub repository that has several."""
    train_list: str | None = None
    """Published training list of `source`; found in `path` by its official name when not given."""
    test_list: str | None = None
    """Published test list of `source`; found in `path` by its official name when not given."""
    image_column: str | None = None
    """Column with the pictures; found by its type when not given."""
    label_column: str | None = None
    """Column with the class labels; found by its type when there is just one, else needed."""
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the split to test on."""
    test_fraction: float | None = None
    """Part of each class of `train_split` to hold out and test on, instead of `test_split`."""
    val_fraction: float | None = None
    """Part of each class of the training split to hold out for validation: it chooses the epoch and the temperature.
    Every class of three pictures gets one; none is held out when not given."""
    group_column: str | None = None
    """Column whose equal values belong together (site, animal, patient, burst): `test_fraction` and `val_fraction` hold
    out whole groups. Pictures in class folders get such a column by a metadata.csv: file_name, label, ..."""
    profile: Literal["exponential", "pareto", "as_is"] = "exponential"
    """How class counts fall: `exponential` (CIFAR-LT), `pareto` (ImageNet-LT), or `as_is` (long-tailed already)."""
    imbalance_factor: float = 100.0
    """Largest class count over the smallest (gamma); not used by `as_is`."""
    max_count: int | None = None
    """Images of the largest class; the smallest class size of the full train split when not given."""
    split_seed: int | Literal["first"] = 0
    """Seed that chooses the images of the split; 0 is the published protocol, `first` takes each class's first ones."""
    split: str | None = None
    """Directory of a split that `training/data.py build` made: its pictures are taken, if it is of this protocol."""
    augmentation: Literal["cifar", "imagenet", "plain", "rotated", "mild"] = "cifar"
    """Supervised view: `cifar` (crop, AutoAugment, Cutout), `imagenet` (resized crop, jitter, RandAugment), `plain`
    (padded crop up to 64 pixels, resized crop and jitter above), with which most older methods were published,
    `rotated`, RIDE's and its successors' (the same, and up to 64 pixels turned by up to 15 degrees), or `mild` (crop of
    half the picture at least, jitter), for pretrained encoders and few epochs."""
    streaming: bool = False
    """Read the training pictures while they are needed, and never store them all; for splits that are long-tailed
    already."""
    class_counts: list[int] | None = None
    """Training images of each class, for `streaming`; counted over the label column when not given."""
    shuffle_buffer: int = 1000
    """Pictures among which `streaming` chooses the next one."""
    horizontal_flip: bool = True
    """Whether a mirrored picture keeps its class; false for digits, text, left-right asymmetric defects."""
    on_error: Literal["raise", "skip"] = "raise"
    """Pictures that can't be decoded: `raise` stops and names the first one; `skip` trains on the next picture instead,
    leaves them out of the test, and says how many there were."""
    max_pixels: int = MAX_PIXELS
    """Pixels that a picture may have; decoding takes up to 20 bytes for each. A larger picture counts as broken."""
    num_workers: int = 0
    """Data-loading processes of each training process; on a CPU with few cores, 0 is faster than 1."""

    def __post_init__(self) -> None:
        check_values(self, "data.")
        require(self.imbalance_factor >= 1, f"data.imbalance_factor must be at least 1, got {self.imbalance_factor}")
        require(
            self.max_count is None or self.max_count >= 1, f"data.max_count must be at least 1, got {self.max_count}"
        )
        if self.streaming:
            require(
                self.profile == "as_is" and self.split is None and self.test_fraction is self.val_fraction is None,
                "data.streaming takes a split as it is: make one with `training/data.py build --pictures`, name its "
                "directory in data.path, or publish it, and set data.profile as_is",
            )
        require(
            self.group_column is None or self.test_fraction or self.val_fraction,
            "data.group_column says what belongs together when pictures are held out: set data.test_fraction or "
            "data.val_fraction",
        )
        require(self.streaming or self.class_counts is None, "data.class_counts belongs to data.streaming")
        require(
            self.class_counts is None or min(self.class_counts, default=0) >= 1,
            f"data.class_counts must be positive, got {self.class_counts}",
        )
        require(
            1 <= self.max_pixels <= 2 * MAX_PIXELS,
            f"data.max_pixels must lie in 1..{2 * MAX_PIXELS}, got {self.max_pixels}",
        )
        require(self.shuffle_buffer >= 1, f"data.shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        for name in ("split_seed", "num_workers"):
            value = getattr(self, name)
            require(value == "first" or value >= 0, f"data.{name} must not be negative, got {value}")
        for name in ("test_fraction", "val_fraction"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, f"data.{name} must lie between 0 and 1, got {value}")
