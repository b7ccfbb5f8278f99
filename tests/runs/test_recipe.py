"""The paper's numbers in defaults and recipe files, and what a mistake in a file is answered with."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtail import exponential_counts
from ecl_hf.learning.config import ModelConfig, OptimConfig, TrainConfig
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings
from ecl_hf.runs.folder import RunFolder, flatten
from ecl_hf.runs.recipe import Recipe, prepare_flags

FILES = sorted((Path(__file__).parents[2] / "training" / "recipes").rglob("*.yaml"))

# CIFAR-100-LT (Sec. VI-C); where the paper is silent, the value that changes nothing.
PAPER = {
    "method": "ecl",
    "seed": 0,
    "epochs": 200,
    "batch_size": 64,
    "data.source": "uoft-cs/cifar100",
    "data.path": None,
    "data.subset": None,
    "data.train_list": None,
    "data.test_list": None,
    "data.test_fraction": None,
    "data.split": None,
    "data.image_column": None,
    "data.label_column": None,
    "data.train_split": "train",
    "data.test_split": "test",
    "data.profile": "exponential",
    "data.imbalance_factor": 100.0,
    "data.max_count": None,
    "data.split_seed": 0,
    "data.augmentation": "cifar",
    "data.horizontal_flip": True,
    "data.streaming": False,
    "data.class_counts": None,
    "data.shuffle_buffer": 1000,
    "data.on_error": "raise",
    "data.num_workers": 0,
    "model.architecture": "resnet32_cifar",
    "model.pretrained": False,
    "model.num_experts": None,
    "model.share_stages": None,
    "model.share_blocks": 0,
    "model.classifier": "linear",
    "model.classifier_scale": 16.0,
    "model.image_size": None,
    "loss.sup_reduction": "mean",
    "loss.alpha_logit": 0.6,
    "loss.alpha_feature": 0.6,
    "loss.beta": 1.0,
    "loss.tau": 1.0,
    "loss.temperature": 1.0,
    "loss.contrast_temperature": 0.2,
    "loss.key_momentum": 0.999,
    "loss.queue_size": 1024,
    "loss.projection_dim": 64,
    "optim.lr": 0.01,
    "optim.momentum": 0.9,
    "optim.weight_decay": 0.005,
    "train.gradient_accumulation_steps": 1,
    "train.compile": False,
    "train.gradient_checkpointing": False,
    "train.experts_one_by_one": False,
    "train.checkpoint_every": 10,
    "train.keep_last": 2,
    "train.on_nonfinite": "raise",
    "train.sync_batchnorm": False,
    "train.timeout": 30.0,
    "train.connect_timeout": 1.0,
    "train.max_steps": None,
    "hub.push": False,
    "hub.repo_id": None,
    "hub.private": False,
    "hub.every": None,
    "hub.license": None,
}

LARGE_SCALE = {
    "batch_size": 256,
    "data.profile": "as_is",
    "data.augmentation": "imagenet",
    "data.num_workers": 8,
    "model.architecture": "resnet50",
    "model.classifier": "cosine",
    "loss.queue_size": 8192,
    "loss.projection_dim": 128,
    "optim.lr": 0.04,  # 0.01 per 64 images
}
IMAGENET_LT = LARGE_SCALE | {
    "epochs": 180,
    "data.source": "imagenet_lt",
    "data.test_split": "validation",
    "optim.weight_decay": 5e-4,
}
CHANGES = {
    "imagenet_lt_resnet50": IMAGENET_LT,
    "imagenet_lt_resnext50": IMAGENET_LT | {"model.architecture": "resnext50_32x4d"},
    "inaturalist2018": LARGE_SCALE
    | {"epochs": 90, "data.source": "inaturalist2018", "model.classifier_scale": 32.0, "optim.weight_decay": 1e-4},
    "places_lt": LARGE_SCALE
    | {
        "epochs": 30,
        "data.source": "places_lt",
        "model.architecture": "resnet152",
        "model.pretrained": True,
        "optim.lr": 0.02,
        "optim.weight_decay": 2e-4,
    },
    "cifar100_lt": {
        "data.label_column": "fine_label",
        "loss.sup_reduction": "sum",
        "optim.lr": 0.1,
        "optim.nesterov": True,
        "optim.weight_decay": 0.0002,
        "optim.warmup_epochs": 5.0,
    },
    "cifar100_lt_printed": {"data.label_column": "fine_label"},
    "cifar100_lt_16px": {
        "data.label_column": "fine_label",
        "model.architecture": "resnet20_cifar",
        "model.image_size": 16,
    },
    "cifar10_lt": {"data.source": "uoft-cs/cifar10"},
    "cifar10_lt_small": {
        "epochs": 150,
        "data.source": "uoft-cs/cifar10",
        "data.max_count": 500,
        "model.architecture": "resnet20_cifar",
        "model.image_size": 16,
        "loss.sup_reduction": "sum",
        "optim.lr": 0.1,
        "optim.nesterov": True,
        "optim.weight_decay": 0.0002,
        "optim.warmup_epochs": 3.0,
    },
    "cifar10_lt_small_large_decay": {
        "epochs": 150,
        "data.source": "uoft-cs/cifar10",
        "data.max_count": 500,
        "model.architecture": "resnet20_cifar",
        "model.image_size": 16,
        "loss.sup_reduction": "sum",
        "optim.lr": 0.05,
    },
    "quickstart": {
        "epochs": 20,
        "batch_size": 32,
        "data.source": "digits",
        "data.max_count": 130,
        "data.imbalance_factor": 20.0,
        "data.horizontal_flip": False,
        "model.architecture": "resnet20_cifar",
        "model.image_size": 16,
        "loss.sup_reduction": "sum",
        "optim.lr": 0.05,
    },
}


def from_text(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return Recipe.from_file(file)


def nested(key, value):
    """The YAML text of a dotted key."""
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return yaml.safe_dump(tree)


def test_defaults_are_the_papers():
    values = flatten(asdict(Recipe()))
    assert {key: values[key] for key in PAPER} == PAPER


def test_every_recipe_of_imagenet_tests_on_the_split_with_labels():
    recipes = [Recipe.from_file(file) for file in FILES if "source: imagenet_lt" in file.read_text()]
    assert len(recipes) > 10
    assert {recipe.data.test_split for recipe in recipes} == {"validation"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_files(file):
    recipe = Recipe.from_file(file)
    assert recipe.method in METHODS
    if file.stem in CHANGES:  # those of the paper, and what was measured with them
        assert flatten(asdict(recipe)) == flatten(asdict(Recipe())) | CHANGES[file.stem]


@pytest.mark.parametrize(
    ("name", "num_classes", "largest", "total"),
    [
        ("cifar100_lt", 100, 500, 10_847),
        ("cifar100_lt_printed", 100, 500, 10_847),
        ("cifar100_lt_16px", 100, 500, 10_847),
        ("cifar10_lt", 10, 5000, 12_406),
        ("cifar10_lt_small", 10, 5000, 1_236),
        ("quickstart", 10, 134, 438),
    ],
)
def test_training_images_of_the_recipe_files(name, num_classes, largest, total):
    data = Recipe.from_file(next(file for file in FILES if file.stem == name)).data
    assert sum(exponential_counts(num_classes, data.max_count or largest, data.imbalance_factor)) == total


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sead: 1", ["sead"]),
        ("data:\n  sauce: digits", ["data", "sauce"]),
        ("optim:\n  learning_rate: 0.1", ["optim", "learning_rate"]),
        ("train:\n  loss:\n    tau: 1.0", ["train", "loss"]),
    ],
)
def test_unknown_key_is_named(text, words, tmp_path):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(f"{word}\\b" for word in words)):
        from_text(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "many"),
        ("epochs", 1.5),
        ("seed", [1, 2]),
        ("data.imbalance_factor", "ten"),
        ("data.profile", "linear"),
        ("data.augmentation", "none"),
        ("data.horizontal_flip", 3),
        ("data.max_count", 2.5),
        ("model.num_experts", True),
        ("model.classifier", "euclidean"),
        ("model.pretrained", {"file": "weights"}),
        ("loss.sup_reduction", "median"),
        ("loss.queue_size", 0.5),
        ("optim.lr", "fast"),
        ("train.compile", "perhaps"),
    ],
)
def test_wrong_type_is_named(key, value, tmp_path):
    with pytest.raises(ValueError, match=f'"{key}"'):
        from_text(tmp_path, nested(key, value))


@pytest.mark.parametrize(
    ("key", "allowed", "refused"),
    [
        ("seed", [0], [-1]),
        ("epochs", [1], [0, -3]),
        ("batch_size", [1], [0]),
        ("data.imbalance_factor", [1], [0.99, -10, float("nan")]),
        ("data.max_count", [1], [0, -1]),
        ("data.num_workers", [0], [-1]),
        ("model.num_experts", [1], [0]),
        ("model.image_size", [8], [7, 0]),
        ("loss.alpha_logit", [0], [-0.1, float("nan")]),
        ("loss.alpha_feature", [0], [-0.1]),
        ("loss.beta", [0], [-1]),
        ("loss.tau", [0], [-0.5]),
        ("loss.temperature", [0.01], [0, -1]),
        ("loss.contrast_temperature", [0.01], [0, -0.2]),
        ("loss.queue_size", [1], [0]),
        ("loss.projection_dim", [1], [0]),
        ("loss.key_momentum", [0, 1], [-0.001, 1.001, float("nan")]),
        ("optim.lr", [1e-9], [0, -0.1, float("nan")]),
        ("optim.momentum", [0, 0.999], [1, -0.1]),
        ("optim.weight_decay", [0], [-0.005]),
        ("train.gradient_accumulation_steps", [1], [0]),
        ("train.checkpoint_every", [1], [0]),
        ("train.keep_last", [1], [0]),
        ("train.max_steps", [1], [0]),
    ],
)
def test_range_of_every_bounded_key(key, allowed, refused, tmp_path):
    for value in allowed:
        assert flatten(asdict(from_text(tmp_path, nested(key, value))))[key] == value
    for value in refused:
        with pytest.raises(ValueError, match=rf"{key} must .*, got "):
            from_text(tmp_path, nested(key, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub: {push: true}\n", "hub.push needs hub.repo_id$"),
        ("hub: {every: 5}\n", "hub.every needs hub.push$"),
        ("hub: {push: true, repo_id: me/x, every: 0}\n", "hub.every must be at least 1, got 0$"),
    ],
)
def test_uploads_need_a_repository(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_text(tmp_path, text)


@pytest.mark.parametrize("text", ["5e-3", "0.005", "5.0e-3", "'5e-3'", ".5e-2"])
def test_number_in_scientific_notation(text, tmp_path):
    recipe = from_text(tmp_path, f"optim:\n  lr: {text}\n")
    assert type(recipe.optim.lr) is float
    assert recipe.optim.lr == 0.005


def test_whole_number_for_a_float_is_a_float(tmp_path):
    recipe = from_text(tmp_path, "data:\n  imbalance_factor: 50\n")
    assert type(recipe.data.imbalance_factor) is float
    assert recipe.data.imbalance_factor == 50


@pytest.mark.parametrize(
    ("text", "pretrained"), [("true", True), ("false", False), ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k")]
)
def test_pretrained_is_a_switch_or_a_name(text, pretrained, tmp_path):
    found = from_text(tmp_path, f"model:\n  pretrained: {text}\n").model.pretrained
    assert type(found) is type(pretrained)
    assert found == pretrained


OTHER = Recipe(
    method="ecl_shuffled",
    seed=7,
    epochs=3,
    batch_size=10,
    data=DataConfig(
        source="digits",
        path="/data/weeds 2: new",
        image_column="img",
        label_column="123",
        train_split="null",
        profile="pareto",
        imbalance_factor=12.5,
        max_count=40,
        split_seed="first",
        test_fraction=0.25,
        augmentation="imagenet",
        horizontal_flip=False,
        num_workers=2,
    ),
    model=ModelConfig(pretrained="weights.safetensors", num_experts=2, classifier="cosine", image_size=64),
    loss=ECLSettings(sup_reduction="sum", alpha_logit=0.0, beta=1e-7, key_momentum=1.0, queue_size=5),
    optim=OptimConfig(lr=1e-5, momentum=0.0, weight_decay=5e-4),
    train=TrainConfig(gradient_accumulation_steps=2, compile=True, checkpoint_every=1, keep_last=1, max_steps=17),
)


@pytest.mark.parametrize("recipe", [Recipe(), OTHER], ids=["defaults", "other"])
def test_written_recipe_is_read_back_equal(recipe, tmp_path):
    again = from_text(tmp_path, yaml.safe_dump(asdict(recipe)))
    assert again == recipe
    assert {key: type(value) for key, value in flatten(asdict(again)).items()} == {
        key: type(value) for key, value in flatten(asdict(recipe)).items()
    }


def test_flags_override_the_recipe_file():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", action="config")
    Recipe.add_arguments(parser)
    file = next(file for file in FILES if file.stem == "cifar10_lt_small")
    flags = [f"--recipe={file}", "--optim.lr=5e-3", "--data.max_count=7", "--model.pretrained=true", "--seed", "4"]
    recipe = Recipe.from_arguments(parser, parser.parse_args(flags))
    expected = {"optim.lr": 0.005, "data.max_count": 7, "model.pretrained": True, "seed": 4}
    assert flatten(asdict(recipe)) == flatten(asdict(Recipe())) | CHANGES["cifar10_lt_small"] | expected


def test_configurations_are_not_shared():
    first, second = Recipe(), Recipe()
    first.loss.beta = 0.0
    assert second.loss.beta == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nbatch_size:\n", "batch_size has no value"),
        ("data:\n  horizontal_flip:\n", r"data\.horizontal_flip has no value"),
        ("loss:\n  sup_reduction:\n", r"loss\.sup_reduction has no value"),
        ("seed: 1\ndata:\n", "data must be a section"),
        ("loss: 3\n", "loss"),
        ("optim:\n  lr: .inf\n", r"optim\.lr must be finite"),
        ("model:\n  classifier_scale: -1\n", r"model\.classifier_scale must be positive"),
        ("data:\n  split_seed: -1\n", r"data\.split_seed must not be negative"),
        ("data:\n  split_seed: last\n", r"data\.split_seed"),
        ("data:\n  test_fraction: 0\n", r"data\.test_fraction must lie between 0 and 1"),
        ("data:\n  test_fraction: 1.0\n", r"data\.test_fraction must lie between 0 and 1"),
    ],
)
def test_empty_or_senseless_values_are_named(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.from_file(tmp_path / "recipe.yaml")


def test_a_setting_of_another_method_names_both(tmp_path):
    with pytest.raises(ValueError, match=r"loss\.alpha_logit is no setting of bc, but of bkt, .*; it has"):
        from_text(tmp_path, "method: bc\nloss:\n  alpha_logit: 0.5\n")
    with pytest.raises(ValueError, match=r"loss\.alphas is no setting of ecl; it has .*alpha_logit"):
        prepare_flags(["--loss.alphas=1"])


@pytest.mark.parametrize("as_two_words", [False, True])
def test_another_method_leaves_out_what_it_does_not_have(as_two_words, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: ecl\nepochs: 7\nloss:\n  sup_reduction: sum\n  beta: 0.5\n")
    given = ["--recipe", str(file)] if as_two_words else [f"--recipe={file}"]
    flags, method, left_out = prepare_flags([*given, "--method", "bc"])
    assert (method, left_out) == ("bc", ["loss.beta"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", action="config")
    Recipe.add_arguments(parser, method)
    recipe = Recipe.from_arguments(parser, parser.parse_args(flags))
    assert (recipe.method, recipe.epochs, recipe.loss.sup_reduction) == ("bc", 7, "sum")


def test_another_method_takes_no_setting_that_means_something_else(tmp_path):
    """ECL's `beta` weighs a loss, that of `cb` counts images; the queue of ECL and PaCo is the same part."""
    file = tmp_path / "recipe.yaml"
    file.write_text("method: ecl\nloss:\n  queue_size: 8\n  beta: 0.5\n  temperature: 2.0\n")
    assert prepare_flags([f"--recipe={file}", "--method=cb"])[2] == ["loss.queue_size", "loss.beta", "loss.temperature"]
    assert prepare_flags([f"--recipe={file}", "--method=paco"])[2] == ["loss.beta", "loss.temperature"]
    assert Recipe.named(file, method="paco").loss.queue_size == 8
    assert Recipe.named(file, method="cb").loss.beta == 0.9999


def test_stage_epochs_add_up():
    with pytest.raises(ValueError, match=r"stage_epochs has 2 entries; bc has 1 stages"):
        Recipe(method="bc", epochs=5, stage_epochs=[4, 1])
    with pytest.raises(ValueError, match=r"stage_epochs \[4\] must be positive and add up to epochs, which is 5"):
        Recipe(method="bc", epochs=5, stage_epochs=[4])
    assert Recipe(method="bc", epochs=5).epochs_of_stages == [5]


@pytest.mark.parametrize("flag", ["--data.imbalance_factor=50", "--data.max_count=50"])
@pytest.mark.parametrize("where", [["--data.profile", "as_is"], ["--data.profile=as_is"], ["--recipe", "places_lt"]])
def test_flag_that_a_profile_does_not_use_is_refused(flag, where):
    key = flag.removeprefix("--").partition("=")[0]
    with pytest.raises(ValueError, match=f"^{key} does nothing with data.profile as_is"):
        prepare_flags([flag, *where])
    prepare_flags([flag, *where, "--data.profile", "pareto"])


def test_recipe_with_an_imbalance_factor_serves_pictures_as_they_are():
    """The factor is the recipe's, and nobody asked for it with this profile."""
    prepare_flags(["--recipe", "quickstart", "--data.profile", "as_is"])
    assert Recipe.named("quickstart", data={"profile": "as_is"}).data.profile == "as_is"
    with pytest.raises(ValueError, match="imbalance_factor does nothing with"):
        Recipe.named("quickstart", data={"profile": "as_is", "imbalance_factor": 5.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"patience": 3}}, r"train\.patience looks at validation pictures: set data\.val_fraction"),
        (
            {
                "model": {"head_init": "class_means", "classifier": "cosine"},
                "data": {"streaming": True, "profile": "as_is"},
            },
            r"model\.head_init class_means .* data\.streaming does not allow",
        ),
        ({"model": {"share_blocks": 1}}, r"model\.share_blocks counts blocks behind .*: set model\.share_stages"),
        ({"model": {"share_blocks": 1}, "method": "bbn"}, r"model\.share_blocks .*: set model\.share_stages"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(changes, message, tmp_path):
    (tmp_path / "plain.yaml").write_text("method: bc\n")
    with pytest.raises(ValueError, match=message):
        Recipe.named(tmp_path / "plain.yaml", **changes)


@pytest.mark.parametrize("name", ["photos", "photos_tuned", "cifar100_lt_features"])
def test_recipes_for_photos_take_every_method(name):
    recipe = Recipe.named(name)
    for method in METHODS:
        replace(recipe, method=method, loss=None)


def test_file_with_counts_that_its_own_profile_does_not_use_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("data: {profile: as_is, imbalance_factor: 50}\n")
    message = r"data\.imbalance_factor does nothing with data\.profile as_is"
    with pytest.raises(ValueError, match=message):
        prepare_flags(["--recipe", str(file)])
    with pytest.raises(ValueError, match=message):
        Recipe.named(file)
    prepare_flags(["--recipe", str(file), "--data.profile=pareto"])
    assert Recipe.named(file, data={"profile": "pareto"}).data.imbalance_factor == 50
    file.write_text(yaml.safe_dump(asdict(Recipe.named("places_lt"))))  # as a run's folder holds it
    prepare_flags(["--recipe", str(file)])
    Recipe.named(file)


def test_run_of_an_older_version_is_read_without_the_settings_that_its_method_lost(tmp_path):
    recipe = Recipe(method="ncl", epochs=7)
    recipe.loss.alpha_logit = 0.3
    tree = asdict(recipe)
    tree["loss"] |= {"tau": 2.0, "sup_reduction": "sum"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert Recipe.of_run(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(ValueError, match=r"loss\.sup_reduction is no setting of ncl"):
        RunFolder(tmp_path).check(recipe, resume=True)  # another version's may mean something
    (tmp_path / "recipe.yaml").write_text("method: ncl\nloss: 3\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: loss must be a section"):
        Recipe.of_run(tmp_path / "recipe.yaml")
