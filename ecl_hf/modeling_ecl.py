"""K independent experts behind one Hugging Face model: everything that inference needs, and nothing else.

- An expert is a timm encoder without classifier plus a classification head (Sec. V-E keeps just these two).
- The ensemble's logits are the mean of the experts' raw logits.
- Experts may share their first stages; what they share runs once.
- Saved with one safetensors file per expert, and one of what they share, so that one expert can be read without the
  others. No pickle is ever read or written.
- A repository is untrusted input: what is wrong with it is an error that names the file.
- timm's own initialisation is kept: `_init_weights` touches the heads alone.
"""

import copy
import json
import math
import operator
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files, extract_commit_hash

from .backbones import create_encoder, cut_encoder
from .configuration_ecl import ECLConfig

DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
PUSH_KEYS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description")
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
ADVICE = {
    401: "log in with `hf auth login`, or give a token of an account that has access",
    403: "the token lacks a permission (to publish: write permission), or access conditions must be accepted first",
    404: "check the repository's name and whether the token may see it",
    409: "somebody else is committing to the repository; try again",
    429: "the Hub asks to slow down; wait some minutes and try again",
}


def log_prior_shift(
    class_counts: Sequence[int] | Tensor, target_prior: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Gap of the log priors of training and test set, `log p_s - log p_t` (Eq. 2).

    Args:
        class_counts: training images of each class, [C]; a zero is counted as one, with a warning.
        target_prior: class probabilities (or weights) of the test set, [C]; uniform when None.

    Returns:
        [C], float32.

    Raises:
        ValueError: a negative or non-finite entry, or lengths that differ.
    """
    counts = torch.as_tensor(class_counts).to("cpu", torch.float64)
    if counts.ndim != 1 or not len(counts) or not counts.isfinite().all() or counts.min() < 0:
        raise ValueError("class_counts must be one non-negative number for each class")
    if empty := (counts == 0).nonzero().flatten().tolist():
        warnings.warn(f"{len(empty)} classes have no training image and are counted as one: {empty[:10]}", stacklevel=2)
        counts = counts.clamp_min(1)
    source = counts / counts.sum()
    if target_prior is None:
        return (source.log() + math.log(len(counts))).float()
    target = torch.as_tensor(target_prior).to("cpu", torch.float64)
    if target.shape != counts.shape:
        raise ValueError(f"target_prior has shape {list(target.shape)}, but there are {len(counts)} classes")
    if not target.isfinite().all() or target.min() < 0 or target.sum() == 0:
        raise ValueError("target_prior must hold non-negative finite numbers, not all of them zero")
    target = (target / target.sum()).clamp_min(torch.finfo(torch.float32).tiny)  # a zero would give infinite logits
    return (source.log() - target.log()).float()


class ECLHead(nn.Linear):
    """Linear classifier, [B, D] -> [B, C]."""


class ECLCosineHead(nn.Linear):
    """Cosine classifier, `scale * cos(v, w_c) + b_c`; [B, D] -> [B, C]."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Uniform weights and a zero bias."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        cosine = F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))
        return self.scale * cosine + self.bias


def create_head(config: ECLConfig, in_features: int) -> nn.Linear:
    """A freshly initialised classifier of the configured kind."""
    if config.classifier == "cosine":
        return ECLCosineHead(in_features, config.num_labels, config.classifier_scale)
    return ECLHead(in_features, config.num_labels)


def data_config(pretrained_cfg: dict[str, Any], model_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an image processor must know of timm's `pretrained_cfg`, for a model built with these arguments."""
    known = {key: pretrained_cfg[key] for key in DATA_KEYS if pretrained_cfg.get(key) is not None}
    channels, height, width = known["input_size"]
    size = (model_args or {}).get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    known["input_size"] = ((model_args or {}).get("in_chans", channels), height, width)
    return known


def expert_disagreement(expert_logits: Tensor) -> Tensor:
    """How much the experts' predictions differ: their Jensen-Shannon divergence in nats.

    It is the entropy of the mean prediction minus the mean entropy of the predictions: 0 if all experts agree, at most
    log K. In Bayesian terms, the mutual information of label and expert.

    Args:
        expert_logits: raw logits, [B, K, C].

    Returns:
        [B], float32, in 0..log K.
    """
    probabilities = expert_logits.float().softmax(-1)
    mixture = torch.special.entr(probabilities.mean(1)).sum(-1)
    return (mixture - torch.special.entr(probabilities).sum(-1).mean(1)).clamp_min(0)


class Trunk(nn.Module):
    """Stem and first stages, which all experts share; [B, 3, H, W] -> activations."""

    def __init__(self, config: ECLConfig) -> None:
        super().__init__()
        whole = create_encoder(config.architecture, **(config.model_args or {}))
        self.backbone = cut_encoder(whole, config.share_stages, keep="first")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """What enters the experts."""
        return self.backbone.forward_features(pixel_values)


class Expert(nn.Module):
    """One expert: encoder, or the stages that it does not share, and classification head.

    [B, 3, H, W], or the trunk's activations -> features [B, D] and logits [B, C].
    """

    def __init__(self, config: ECLConfig) -> None:
        super().__init__()
        self.backbone = create_encoder(config.architecture, **(config.model_args or {}))
        if config.share_stages:
            cut_encoder(self.backbone, config.share_stages, keep="rest")
        self.head = create_head(config, self.backbone.head_hidden_size)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features and raw logits."""
        features = self.backbone(pixel_values)
        return features, self.head(features)


@dataclass
class ECLImageClassifierOutput(ModelOutput):
    """What the model returns; batch first everywhere.

    Attributes:
        loss: mean over experts of the cross-entropy that fits `config.logit_prior`, when labels are given.
        logits: mean of the experts' raw logits, adjusted to `target_prior` if one is given; [B, C].
        expert_logits: raw logits of each expert, [B, K, C].
        disagreement: of the experts, as an uncertainty in nats (`expert_disagreement`), [B].
        features: pooled backbone features of each expert, [B, K, D], when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    expert_logits: Tensor | None = None
    disagreement: Tensor | None = None
    features: Tensor | None = None


class ECLForImageClassification(PreTrainedModel):
    """An ensemble of K timm encoders with their classification heads."""

    config_class = ECLConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _no_split_modules = ("Expert", "Trunk")

    def __init__(self, config: ECLConfig) -> None:
        super().__init__(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))
        self.trunk = Trunk(config) if config.share_stages else None
        if self.trunk and (twice := {*self.trunk.backbone.state_dict()} & {*self.experts[0].backbone.state_dict()}):
            raise ValueError(
                f"share_stages: {config.architecture} has weights outside of its stages: {min(twice)}; "
                "take 0, or a ResNet, ConvNeXt or Swin, for instance"
            )
        if config.pretrained_cfg is None:
            config.pretrained_cfg = data_config(self.experts[0].backbone.pretrained_cfg, config.model_args)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # No super(): it would draw timm's weights anew. Non-persistent buffers are garbage after loading on `meta`.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif isinstance(module, ECLHead | ECLCosineHead):
            module.reset_parameters()

    def get_input_embeddings(self) -> None:
        """Pictures have no embedding table."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        target_prior: Sequence[float] | Tensor | None = None,
        output_features: bool = False,
        flip: bool = False,
        return_dict: bool | None = None,
    ) -> ECLImageClassifierOutput | tuple[Tensor, ...]:
        """Classify a batch.

        Args:
            pixel_values: normalised images, [B, 3, H, W].
            labels: class indices, [B]; asks for the loss.
            target_prior: class probabilities of the data to be classified, [C]; moves the logits from the prior that
                they carry (`config.logit_prior`) to this one (Eq. 2 and 4, tau = 1).
            output_features: return the pooled features (of the images as they are) too.
            flip: every expert's logits are the mean of those of the image and of its mirror image.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: `target_prior` does not hold one non-negative number for each class.
        """
        features, expert_logits = self._run_experts(pixel_values)
        if flip:
            expert_logits = (expert_logits + self._run_experts(pixel_values.flip(-1))[1]) / 2
        logits = expert_logits.mean(1)
        loss = None
        if labels is not None:
            shifted = expert_logits
            if self.config.logit_prior == "uniform" and self.config.class_counts is not None:
                shifted = expert_logits + log_prior_shift(self.config.class_counts).to(logits)
            loss = F.cross_entropy(shifted.flatten(0, 1), labels.repeat_interleave(len(self.experts)))
        if target_prior is not None:
            carried = self.config.class_counts if self.config.logit_prior == "train" else [1] * self.config.num_labels
            logits = logits - log_prior_shift(carried, target_prior).to(logits)
        output = ECLImageClassifierOutput(
            loss, logits, expert_logits, expert_disagreement(expert_logits), features if output_features else None
        )
        return output.to_tuple() if return_dict is False else output

    def _run_experts(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, K, D] and logits [B, K, C]; experts may lie on different devices."""
        inputs = pixel_values if self.trunk is None else self.trunk(pixel_values)
        outputs = [expert(inputs) for expert in self.experts]
        features, logits = zip(*outputs, strict=True)
        return tuple(torch.stack([t.to(pixel_values.device) for t in tensors], dim=1) for tensors in (features, logits))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        experts: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> "ECLForImageClassification":
        """Load a saved ensemble, or some of its experts.

        Args:
            pretrained_model_name_or_path: directory or Hub repository.
            *args: passed on.
            experts: positions of the experts to load, in this order; only their files are read (or downloaded), and
                that of what they share.
            **kwargs: as for every `PreTrainedModel`, but there is no `variant`; a `state_dict` is used in place of the
                saved weights.

        Raises:
            ValueError: `experts` names one that is not there, none, or one twice; encoder weights are missing or of
                another shape; or a weight file is damaged, is not what the index says, or holds numbers that are not
                finite.
            RuntimeError: the heads are for another number of classes.
            OSError: the repository or a file is not there, or can't be had.
        """
        if kwargs.pop("variant", None):
            raise ValueError("ECL models have no variants of their weights; dtype= chooses the precision")
        with_info = kwargs.pop("output_loading_info", False)
        state = kwargs.pop("state_dict", None)
        # Not for the configuration, which would take "auto" for a type.
        precision = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        source = pretrained_model_name_or_path
        config = kwargs.pop("config", None) or source
        if not isinstance(config, PreTrainedConfig):
            try:
                with explain_hub_errors(config, "read"):
                    config, kwargs = cls.config_class.from_pretrained(
                        config, return_unused_kwargs=True, **hub, **kwargs
                    )
            except RecursionError as error:
                raise ValueError(f"config.json of {source} is nested too deeply") from error
        config = copy.deepcopy(config)
        if state is None:
            chosen = range(config.num_experts) if experts is None else _positions(experts, config, source)
            state = _read_experts(source, config, chosen, hub)
            config.num_experts = len(chosen)
        elif experts is not None:
            raise ValueError("experts= chooses among saved weights; with a state_dict of your own, choose there")
        _check_fit(state, config, source, new_heads=kwargs.get("ignore_mismatched_sizes", False))
        model, info = super().from_pretrained(
            None, *args, config=config, state_dict=state, output_loading_info=True, **precision, **kwargs
        )
        if source is not None:
            model.name_or_path = model.config.name_or_path = str(source)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write configuration, code, weights and, if there is none, a short model card.

        There is one file of weights for each expert and, behind them, what is left for the weights that they share.

        Args:
            save_directory: where to; other weights in it are replaced.
            push_to_hub: also upload the directory, to `repo_id` or a repository of the directory's name; a card that
                the repository has gives way only to one that was in the directory before.
            **kwargs: as for every `PreTrainedModel` and for `push_to_hub`; `max_shard_size` has no effect.

        Raises:
            ValueError: a `variant` is asked for.
        """
        if kwargs.pop("variant", None):
            raise ValueError("ECL models have no variants of their weights; model.half() saves half precision")
        hub = {key: kwargs.pop(key) for key in PUSH_KEYS if key in kwargs}
        directory = Path(save_directory)
        if kwargs.get("is_main_process", True):
            for stale in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):  # loaders prefer a leftover single file
                (directory / stale).unlink(missing_ok=True)
        expert = self.experts[0].state_dict().values()
        kwargs["max_shard_size"] = max(1, sum(tensor.numel() * tensor.element_size() for tensor in expert))
        super().save_pretrained(directory, **kwargs)
        if kwargs.get("is_main_process", True):
            hub = {"repo_id": directory.name, "token": kwargs.get("token"), **hub}
            if new_card := not (directory / "README.md").exists():
                short_card(self.config, hub["repo_id"] if push_to_hub else None).save(directory / "README.md")
            if push_to_hub:
                upload_directory(directory, keep_card=new_card, **hub)

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] | None = None, **kwargs: Any) -> CommitInfo:
        """Save and upload in one commit; a card that the repository has stays.

        Args:
            repo_id: Hub repository, made if it is not there.
            tags: more tags for a new card.
            **kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`;
                `max_shard_size` has no effect: there is one file per expert.

        Raises:
            HfHubHTTPError: the Hub refused; the message says what to do.
        """
        kwargs.pop("max_shard_size", None)
        with TemporaryDirectory() as directory:
            short_card(self.config, repo_id, tags or ()).save(Path(directory) / "README.md")
            self.save_pretrained(directory)
            return upload_directory(directory, repo_id, keep_card=True, **kwargs)


def short_card(config: ECLConfig, repo_id: str | None, tags: Sequence[str] = ()) -> ModelCard:
    """A model card that says what the configuration knows: how to load the model, and that nothing was measured."""
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="image-classification", tags=["ecl", "long-tailed", "timm", *tags]
    )
    repo_id = repo_id or "REPOSITORY"
    ensemble = f"{config.num_experts} x {config.architecture}, {config.num_labels} classes"
    return ModelCard(
        f"---\n{metadata}\n---\n\n# Long-tailed image classifier\n\n"
        f"An ensemble for long-tailed data ({ensemble}), one safetensors file per expert.\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model="{repo_id}", trust_remote_code=True)\n```\n\n'
        f'With the package `ecl_hf`, `ECLForImageClassification.from_pretrained("{repo_id}", experts=[0])` reads one\n'
        "expert alone, and `trust_remote_code` is not needed.\n\nEvaluation: not measured.\n"
    )


def _hub_status(error: BaseException | None) -> int | None:
    """The Hub's answer that led to an error, perhaps by way of another error."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__
    return None


@contextmanager
def explain_hub_errors(repo_id: str | Path, doing: str = "write to") -> Iterator[None]:
    """Let an error of the Hub say what to do; a failed connection is a ConnectionError, whatever library reports it."""
    try:
        yield
    except OSError as error:
        status = _hub_status(error) or 0
        if advice := ADVICE.get(status, "the Hub has trouble; try again later" if status >= 500 else None):
            explanation = f"\nCan't {doing} {repo_id}: {advice} (the Hub answered {status})."
            if not isinstance(error, HfHubHTTPError):  # transformers knows of failed connections only
                raise OSError(f"{error}{explanation}") from error
            error.append_to_message(explanation)
        raise
    except (ValueError, TypeError, RecursionError):  # not of the connection
        raise
    except Exception as error:
        raise ConnectionError(f"the connection to the Hub failed ({repo_id}): {error}; try again") from error


def upload_directory(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Upload a saved model in one commit that also deletes weight files of another layout.

    Args:
        directory: what to upload.
        repo_id: Hub repository, made if it is not there.
        private: whether a new repository is private.
        token: of the Hub; the stored one when None.
        revision: branch, made if it is not there.
        create_pr: open a pull request instead.
        commit_message: title of the commit.
        commit_description: text of the commit.
        keep_card: leave a card that the repository has.

    Raises:
        HfHubHTTPError: the Hub refused; the message says what to do.
    """
    api = HfApi(token=token)
    with explain_hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = ["README.md"] if keep_card and api.file_exists(repo_id, "README.md", revision=revision) else None
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            ignore_patterns=kept,
            delete_patterns=list(WEIGHT_FILES),
        )


def _positions(experts: Sequence[int], config: ECLConfig, source: str | Path) -> list[int]:
    """The chosen experts as integers, if they name different ones of those that are there."""
    try:
        chosen = [operator.index(k) for k in experts]
    except TypeError:
        chosen = []
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(config.num_experts)):
        raise ValueError(
            f"experts={experts} must be a list of different experts out of 0..{config.num_experts - 1} of {source}"
        )
    return chosen


def _read_experts(
    source: str | Path, config: ECLConfig, experts: Sequence[int], hub: dict[str, Any]
) -> dict[str, Tensor]:
    """State dict of the chosen experts, renumbered from 0, and of what they share; opens their files only."""
    parts = {f"experts.{k}.": f"experts.{position}." for position, k in enumerate(experts)}
    if config.share_stages:
        parts["trunk."] = "trunk."
    with explain_hub_errors(source, "read"):
        try:
            index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub)
        except OSError as error:
            if _hub_status(error):  # else it is not there, or not in the cache: one file may hold everything
                raise
            index = None
    names = {part: [SAFE_WEIGHTS_NAME] for part in parts}
    if index:
        weight_map = _read_index(index, source)
        names = {part: sorted({f for key, f in weight_map.items() if key.startswith(part)}) for part in parts}
        if pinned := extract_commit_hash(index, None):  # else the files could be those of a later commit
            hub = {**hub, "revision": pinned}
    if empty := [part for part in parts if not names[part]]:
        raise ValueError(f"{source} has {SAFE_WEIGHTS_INDEX_NAME}, but it names no weights of {empty[0][:-1]}")
    wanted = sorted({name for files in names.values() for name in files})
    with explain_hub_errors(source, "read"):
        paths = dict(zip(wanted, cached_files(source, wanted, **hub), strict=True))
    state = {}
    for part, renamed in parts.items():
        for name in names[part]:
            tensors = _read_tensors(paths[name], part, source)
            state |= {f"{renamed}{key}": tensor for key, tensor in tensors.items()}
    return state


def _check_fit(state: dict[str, Tensor], config: ECLConfig, source: str | Path | None, *, new_heads: bool) -> None:
    """Refuse weights that do not fit, before memory is taken for the model: left alone, it would hold anything."""
    with torch.device("meta"):  # one expert, which stands for all, and nothing in its tensors
        parts = dict.fromkeys((f"experts.{k}." for k in range(config.num_experts)), Expert(config).state_dict())
        if config.share_stages:
            parts["trunk."] = Trunk(config).state_dict()
    shapes = {f"{part}{name}": tensor.shape for part, tensors in parts.items() for name, tensor in tensors.items()}
    unfit = sorted(key for key, shape in shapes.items() if key in state and state[key].shape != shape)
    absent = sorted(key for key in shapes if ".backbone." in key and key not in state)
    if encoder := [*absent, *(key for key in unfit if ".backbone." in key)]:
        raise ValueError(
            f"{source} has no fitting weights for {len(encoder)} encoder tensors of {config.architecture}, such as "
            f"{encoder[0]}; it is incomplete or made for another architecture"
        )
    if unfit and not new_heads:
        raise RuntimeError(
            f"the heads of {source} do not fit: {unfit[0]} is {list(state[unfit[0]].shape)}, but the configuration "
            f"asks for {list(shapes[unfit[0]])}; ignore_mismatched_sizes=True starts new heads"
        )


def _read_index(path: str, source: str | Path) -> dict[str, str]:
    """Tensor name -> file name, which must lie beside the index."""
    try:
        weight_map = json.loads(Path(path).read_text())["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {source} is no index of weights: {error!r}") from error
    if strange := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name))]:
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {source} names {strange[0]!r}, which is no weight file beside it"
        )
    return weight_map


def _read_tensors(path: str, prefix: str, source: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with the prefix, which is removed."""
    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  (not a mapping)
            tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{name} of {source} is damaged or no safetensors file ({error}); get it anew") from error
    for key, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
            raise ValueError(f"{name} of {source} holds {tensor.dtype} in {prefix}{key}, which no ECL model does")
        # What is finite in double precision may not be so in single.
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{name} of {source} holds numbers that are not finite, in {prefix}{key}; don't use it")
    return tensors


__all__ = ["ECLForImageClassification", "ECLImageClassifierOutput", "expert_disagreement"]
