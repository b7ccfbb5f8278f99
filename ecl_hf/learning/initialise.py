"""A fresh ensemble for training: random or pretrained encoders, randomly initialised heads."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError

from ecl_hf.backbones import create_encoder
from ecl_hf.configuration_ecl import ECLConfig
from ecl_hf.learning.config import ModelConfig
from ecl_hf.methods.base import HeadKind, Method
from ecl_hf.modeling_ecl import ECLForImageClassification, data_config

_PROBE_SEED = 0x0DD5EED
"""Of two identical initialisations. With a seed that people train with, a frozen layer could look as if not loaded."""


def initialise_model(
    config: ModelConfig, method: Method, class_counts: list[int], class_names: list[str], settings: Any = None
) -> ECLForImageClassification:
    """Build the ensemble that a method trains.

    Args:
        config: the recipe's model section.
        method: knows the number of experts, the kind of its heads, and which prior the logits will carry.
        class_counts: training images of each class, [C].
        class_names: [C].
        settings: of the method.

    Raises:
        ValueError: an unknown architecture, pretrained weights that don't fit it, or a value that no published model
            may have; the message names the recipe's key.
        FileNotFoundError: no such file of pretrained weights.
    """
    model_args, pretrained_cfg, state = _encoder_settings(config)
    num_experts = method.num_experts(config.num_experts)
    stages, blocks = shared_parts(config, method)
    sides = method.experts.side_branches and stages > 0 and blocks == 0
    head = method.head or HeadKind(config.classifier, config.classifier_scale)
    counts = torch.tensor(class_counts, dtype=torch.float64).clamp_min(1)
    prior = method.logit_prior
    if callable(prior):
        prior = prior(counts, settings, num_experts)
        prior = prior.tolist() if prior.max() - prior.min() > 1e-9 else "uniform"
    with torch.device("meta"):  # no weights, and no random numbers
        width = create_encoder(config.architecture, **model_args).head_hidden_size if head.neck else 0
    try:
        published = ECLConfig(
            architecture=config.architecture,
            num_experts=num_experts,
            share_stages="all" if config.tune == "head" and num_experts > 1 else stages,
            share_blocks=blocks,
            side_branches=[1 + k % stages for k in range(num_experts)] if sides else None,
            aggregation=method.aggregation(counts, settings, num_experts) if method.aggregation else "mean",
            classifier=head.kind,
            classifier_scale=head.scale,
            classifier_bias=head.bias,
            classifier_chunks=head.chunks,
            classifier_neck=head.neck * width,
            class_counts=class_counts,
            logit_prior=prior,
            model_args=model_args or None,
            pretrained_cfg=pretrained_cfg,
            id2label=dict(enumerate(class_names)),
            label2id={name: c for c, name in enumerate(class_names)},
        )
    except StrictDataclassError as error:
        raise ValueError(_in_the_recipe(str(error.__cause__ or error))) from error
    model = ECLForImageClassification(published)
    if stages:
        _check_cut(model)
    if state is not None:
        for part in (*model.experts, *filter(None, [model.trunk])):
            part.backbone.load_state_dict({key: state[key] for key in part.backbone.state_dict()})
    return model


def _in_the_recipe(message: str) -> str:
    """What is wrong with a published configuration, with the key of the recipe's section `model` that it comes from."""
    name = re.match(r"\w*", message)[0]
    if name == "pretrained_cfg":
        return f"model.image_size: {message}"
    return f"model.{message}" if name in {item.name for item in fields(ModelConfig)} else f"model: {message}"


def shared_parts(config: ModelConfig, method: Method) -> tuple[int, int]:
    """Stages and further blocks that the experts share: the recipe's, or the method's where it says nothing.

    With `model.tune head` they share the whole encoder, which is no matter of stages.
    """
    if config.tune == "head":
        return 0, 0
    if config.share_stages is not None or method.experts.shared is None:
        return config.share_stages or 0, config.share_blocks
    with torch.device("meta"):  # no weights, and no random numbers
        return method.experts.shared(create_encoder(config.architecture))


@torch.no_grad()
def _check_cut(model: ECLForImageClassification) -> None:
    """See that trunk and rest compute what the whole encoder does; some of timm's do not run part after part."""
    config, expert = model.config, model.experts[0]
    with torch.random.fork_rng():
        whole = create_encoder(config.architecture, **(config.model_args or {})).eval()
        image = torch.randn(1, *config.pretrained_cfg["input_size"])
    reason = "they compute something else"
    model.eval()
    try:
        if model.sides is not None:
            model(image)
        whole.load_state_dict(model.trunk.backbone.state_dict() | expert.backbone.state_dict())
        same = torch.allclose(whole(image), expert(model.trunk(image))[0], rtol=1e-4, atol=1e-4)
    except Exception as error:  # of timm's code, with parts that it does not expect
        same, reason = False, error
    model.train()
    if not same:
        raise ValueError(f"model.share_stages: {config.architecture} can't be cut between its stages: {reason}")


def pretrained_tag(config: ModelConfig) -> str | None:
    """Name of the weights that encoders start from: timm's with its full tag, a repository's, a file's; None for none.

    timm's short names change their weights from version to version.
    """
    if config.pretrained is True:
        known = timm.get_pretrained_cfg(config.architecture)
        return f"{known.architecture}.{known.tag}" if known and known.tag else config.architecture
    if isinstance(config.pretrained, str):
        return Path(config.pretrained).name if Path(config.pretrained).is_file() else config.pretrained
    return None


def label_leak(config: ModelConfig, source: str) -> str | None:
    """A sentence if pretrained weights have seen labels that the data set hides.

    ImageNet-LT is a part of ImageNet-1k, whose validation pictures are its test pictures: an encoder that was trained
    on ImageNet-1k has learned the rare classes from all their pictures. timm's tags say what weights were trained on.

    Args:
        config: the recipe's.
        source: of the data.
    """
    tag = pretrained_tag(config)
    if tag is None or source != "imagenet_lt":
        return None
    known = timm.get_pretrained_cfg(config.architecture) if config.pretrained is True else None
    if "in1k" not in tag.lower() and not (known and known.num_classes == 1000):
        return None
    return (
        f"the weights {tag} were trained on ImageNet-1k with all its labels, from which imagenet_lt takes most away: "
        "what is measured says nothing of long-tailed data; take weights with a tag without in1k"
    )


def _encoder_settings(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor] | None]:
    """Arguments for timm, data configuration, and pretrained weights or None."""
    own = create_encoder(config.architecture).pretrained_cfg
    model_args = dict(config.args or {})
    if config.image_size is not None and own.get("fixed_input_size"):
        model_args["img_size"] = config.image_size
    if config.pretrained:
        own, state = _pretrained(config.architecture, config.pretrained, model_args)
    else:
        state = None
    size = {} if config.image_size is None else {"img_size": config.image_size}
    return model_args, data_config(own, size), state


def _pretrained(
    architecture: str, source: bool | str, model_args: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Data configuration and encoder weights from timm (true), a local file, or a Hub repository of timm's format."""
    name, overlay = architecture, None
    if isinstance(source, str):
        if Path(source).is_file():
            overlay = {"file": source, "custom_load": False}  # else timm before 1.0.31 reads some ViTs' as .npz
        elif Path(source).suffix in (".safetensors", ".pth", ".pt", ".bin") or Path(source).exists():
            raise FileNotFoundError(f"model.pretrained {source} is not a file")
        else:
            name = f"hf-hub:{source}"
    try:
        with torch.random.fork_rng():
            torch.manual_seed(_PROBE_SEED)
            encoder = timm.create_model(
                name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **model_args
            )
            torch.manual_seed(_PROBE_SEED)
            untouched = create_encoder(architecture, **model_args).state_dict()
        file = timm.models.load_state_dict(source) if overlay else {}
    except Exception as error:  # for what a file can hold, timm and torch have errors of any kind
        reason = str(error) or type(error).__name__
        raise ValueError(f"model.pretrained={source} can't be loaded into {architecture}: {reason}") from error
    state = encoder.state_dict()
    if state.keys() != untouched.keys():
        raise ValueError(
            f"model.pretrained={source} holds {encoder.pretrained_cfg['architecture']}, not {architecture}"
        )
    # timm loads what fits and only logs the rest: a weight that still has its initial value was not in the file.
    weights = [(key, value) for key, value in encoder.named_parameters() if value.ndim > 1]
    if left := [key for key, value in weights if torch.equal(value, untouched[key])]:
        raise ValueError(
            f"model.pretrained={source} has no weights for {len(left)} tensors of {architecture}: {left[0]}"
        )
    # Where the file's names are the encoder's, it may hold nothing else but a classifier.
    heads = encoder.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    if state.keys() <= file.keys() and (more := [k for k in file.keys() - state.keys() if not k.startswith(heads)]):
        raise ValueError(
            f"model.pretrained={source} is not for {architecture}: it has {len(more)} more tensors, {more[0]}"
        )
    return encoder.pretrained_cfg, state
