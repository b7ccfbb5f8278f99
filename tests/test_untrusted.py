"""A model repository is a stranger's: what is wrong with it is a clear error, and nothing of it is executed."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.teachers import load_teacher
from ecl_hf.repository import seal_weights

SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "model"
    config = ECLConfig(architecture="resnet20_cifar", num_experts=3, class_counts=[50, 5, 1])
    ECLForImageClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture
def repository(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    seal_weights(file.parent)


# What a file can be replaced by, so that whoever opens and reads it waits for ever or fills the memory
ODD_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


LOADERS = [
    pytest.param(ECLForImageClassification.from_pretrained, id="class"),
    pytest.param(AutoModelForImageClassification.from_pretrained, id="auto"),
    pytest.param(lambda path: ECLForImageClassification.from_pretrained(path, experts=[1]), id="expert"),
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_pickle_is_read(repository, tmp_path, load, name):
    """Neither in its own format nor in disguise."""
    for file in [*repository.glob("*.safetensors"), repository / INDEX]:
        file.unlink()
    (repository / name).write_bytes(pickle.dumps({"experts.0.head.weight": Bomb(tmp_path / "harm")}))
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        load(repository)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("content", ["pickle", "half", "empty", "huge header"])
def test_damaged_shard_is_named(repository, tmp_path, load, content):
    file = repository / SECOND
    data = file.read_bytes()
    file.write_bytes(
        {
            "pickle": pickle.dumps(Bomb(tmp_path / "harm")),
            "half": data[: len(data) // 2],
            "empty": b"",
            "huge header": (2**60).to_bytes(8, "little") + data[8:],
        }[content]
    )
    with pytest.raises(ValueError, match=rf"^{SECOND} of .* is damaged or no safetensors file"):
        load(repository)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_missing_shard_is_named(repository, load):
    (repository / SECOND).unlink()
    with pytest.raises(OSError, match=SECOND):
        load(repository)


@pytest.mark.parametrize("odd", ODD_FILES.values(), ids=ODD_FILES)
@pytest.mark.parametrize("name", ["config.json", INDEX, SECOND])
def test_only_regular_files_are_read(repository, name, odd):
    (repository / name).unlink()
    odd(repository / name)
    with pytest.raises((OSError, ValueError), match="config.json" if name == "config.json" else r"model.*safetensors"):
        ECLForImageClassification.from_pretrained(repository)


@pytest.mark.parametrize("place", [-1, -1000, -100_000])
def test_flipped_bit_is_noticed(repository, place):
    content = bytearray((repository / SECOND).read_bytes())
    content[place] ^= 1
    (repository / SECOND).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{SECOND} of .* is not what was saved: .* SHA256SUMS"):
        ECLForImageClassification.from_pretrained(repository)
    assert len(ECLForImageClassification.from_pretrained(repository, experts=[0, 2]).experts) == 2
    (repository / "SHA256SUMS").unlink()
    assert len(ECLForImageClassification.from_pretrained(repository).experts) == 3


def test_checksums_are_those_of_sha256sum(repository):
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4  # three experts and the index


def test_strangers_code_is_not_passed_on(repository, tmp_path):
    own = json.loads((repository / "config.json").read_text())["auto_map"]
    (repository / "evil.py").write_text("")
    code = {**own, "AutoModel": "evil/repo--evil.Evil", "AutoImageProcessor": "evil.Evil"}
    edit(repository / "config.json", auto_map=code, custom_pipelines={"evil": {"impl": "evil.Evil"}}, evil=1)
    with pytest.warns(
        UserWarning, match=r"2 unknown keys are left out: custom_pipelines, evil \(config\.json of .*model"
    ):
        model = ECLForImageClassification.from_pretrained(repository)
    model.save_pretrained(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert saved["auto_map"] == own
    assert "evil" not in json.dumps(saved)


def test_code_of_another_repository_is_not_named_in_any_copy(repository, tmp_path):
    """As in what goes with an ONNX file, of which transformers writes nothing anew."""
    own = json.loads((repository / "config.json").read_text())["auto_map"]
    edit(repository / "config.json", auto_map={key: f"evil/repo--{value}" for key, value in own.items()})
    ECLConfig.from_pretrained(repository).to_json_file(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == own


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "..\\x.safetensors", 7, "x.bin"]
)
def test_index_must_not_point_elsewhere(repository, load, name):
    other = shutil.copytree(repository, repository.parent / "other")
    (other / SECOND).rename(other / "model.safetensors")
    weight_map = json.loads((repository / INDEX).read_text())["weight_map"]
    edit(repository / INDEX, weight_map={key: name if "experts.1." in key else f for key, f in weight_map.items()})
    with pytest.raises(ValueError, match=rf"{INDEX} of .* names .*, which is no weight file beside it"):
        load(repository)


def test_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is neither a directory nor a name of a repository"):
        ECLForImageClassification.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("odd", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipe_or_device_in_place_of_a_directory_is_not_opened(tmp_path, odd):
    odd(tmp_path / "odd")
    with pytest.raises(FileNotFoundError, match=r"odd is neither a directory nor a name of a repository"):
        ECLForImageClassification.from_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"model\.teacher .*odd can't be read: .* is neither a directory"):
        load_teacher(str(tmp_path / "odd"), ["a", "b"], "ecl")


def test_name_that_is_neither_here_nor_on_the_hub_is_said_to_be_both():
    with pytest.raises(OSError, match=r"^there is no directory runs/c100, and no such repository can be read: "):
        ECLForImageClassification.from_pretrained("runs/c100", local_files_only=True)


def test_deep_configuration_is_refused(repository):
    (repository / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json of .* is nested too deeply"):
        ECLForImageClassification.from_pretrained(repository)


def test_large_configuration_is_not_read(repository):
    edit(repository / "config.json", id2label={"0": "x" * 50_000_000})
    with pytest.raises(ValueError, match=r"config\.json has 5000\d+ bytes; more than \d+ are not read"):
        ECLForImageClassification.from_pretrained(repository)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": {}}}',
        "no json",
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_broken_index_is_named(repository, load, text):
    (repository / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        load(repository)


def test_index_without_an_expert_is_named(repository):
    weight_map = json.loads((repository / INDEX).read_text())["weight_map"]
    edit(repository / INDEX, weight_map={key: f for key, f in weight_map.items() if "experts.1." not in key})
    with pytest.raises(ValueError, match=r"names no weights of experts\.1"):
        ECLForImageClassification.from_pretrained(repository)
    assert len(ECLForImageClassification.from_pretrained(repository, experts=[0, 2]).experts) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("load", LOADERS)
def test_numbers_that_are_not_finite_are_refused(repository, load, value):
    weights(repository / SECOND, lambda tensors: tensors["experts.1.head.weight"].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=rf"{SECOND} of .* not finite, in experts\.1\.head\.weight"):
        load(repository)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.double() * 1e300, "not finite"),  # infinite once it is loaded in single precision
        (lambda head: head.to(torch.complex64) * torch.nan, "complex64"),
        (lambda head: head.to(torch.float8_e4m3fn), "float8"),
    ],
)
@pytest.mark.parametrize("load", LOADERS)
def test_other_types_bring_in_no_such_numbers(repository, load, change, message):
    name = "experts.1.head.weight"
    weights(repository / SECOND, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(ValueError, match=rf"{SECOND} of .*{message}.* in experts\.1\.head\.weight"):
        load(repository)


@pytest.mark.parametrize(
    ("name", "shape", "error", "message"),
    [
        ("backbone.conv1.weight", (16, 3, 5, 5), ValueError, "no fitting weights for 1 encoder tensors"),
        ("head.weight", (3, 65), RuntimeError, r"experts\.\d\.head\.weight is \[3, 65\], but .* asks for \[3, 64\]"),
        ("head.weight", (), RuntimeError, r"experts\.\d\.head\.weight is \[\]"),
    ],
)
@pytest.mark.parametrize("load", LOADERS)
def test_tensors_of_another_shape_are_named(repository, load, name, shape, error, message):
    weights(repository / SECOND, lambda tensors: tensors.update({f"experts.1.{name}": torch.zeros(shape)}))
    with pytest.raises(error, match=message):
        load(repository)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("junk", None, None), ("head.bias", RuntimeError, r"head\.bias is \[268435456\], but .* asks for \[3\]")],
)
def test_huge_tensors_are_not_read(repository, name, error, message):
    """A sparse file holds a gigabyte of zeros in a kilobyte."""
    tensors = load_file(repository / SECOND)
    tensors.pop(f"experts.1.{name}", None)
    tensors = {f"experts.1.{name}": torch.zeros(0), **tensors}  # so its numbers can come last
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    giant = {"dtype": "F32", "shape": [1 << 28], "data_offsets": [len(numbers), len(numbers) + (1 << 30)]}
    head = json.dumps({**header, f"experts.1.{name}": giant}).encode()
    (repository / SECOND).write_bytes(len(head).to_bytes(8, "little") + head + numbers)
    os.truncate(repository / SECOND, 8 + len(head) + len(numbers) + (1 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if error:
        with pytest.raises(error, match=message):
            ECLForImageClassification.from_pretrained(repository)
    else:
        with pytest.raises(ValueError, match=rf"{SECOND} has 107\d+ bytes; more than \d+ are not read"):
            ECLForImageClassification.from_pretrained(repository)  # not even for its checksum
        (repository / "SHA256SUMS").unlink()
        ECLForImageClassification.from_pretrained(repository)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_giant_without_weights_takes_no_memory(repository):
    """Built, it would have 64 times 7 gigabytes."""
    edit(repository / "config.json", architecture="vit_giant_patch14_clip_224", num_experts=64)
    for file in [*repository.glob("*.safetensors"), repository / INDEX]:
        file.unlink()
    save_file({f"experts.{k}.head.bias": torch.zeros(3) for k in range(64)}, repository / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"no fitting weights for \d+ encoder tensors of vit_giant"):
        ECLForImageClassification.from_pretrained(repository)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_missing_head_is_refused_or_new_on_request(repository):
    tensors = load_file(repository / SECOND)
    del tensors["experts.1.head.weight"]
    save_file(tensors, repository / SECOND, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for experts\.1\.head\.weight; ignore_mismatched_sizes"):
        ECLForImageClassification.from_pretrained(repository)
    kept = ECLForImageClassification.from_pretrained(repository, ignore_mismatched_sizes=True).experts[1]
    assert torch.equal(kept.head.bias, tensors["experts.1.head.bias"])


def test_weights_for_other_classes_are_refused_before_a_head_is_made(repository):
    edit(repository / "config.json", class_counts=None, id2label={str(c): str(c) for c in range(50_000)}, label2id=None)
    with pytest.raises(RuntimeError, match=r"heads of .* do not fit: .* is \[3\], but .* asks for \[50000\]"):
        ECLForImageClassification.from_pretrained(repository)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 10**9}, "num_experts must lie in 1..64"),
        ({"num_experts": -1}, "num_experts"),
        ({"id2label": None, "label2id": None, "class_counts": None, "num_labels": 10**9}, "num_labels must be at most"),
        ({"id2label": {str(c): "" for c in range(100_001)}, "label2id": None}, "id2label has more than 100000 entries"),
        ({"class_counts": [1] * 100_001}, "class_counts has more than 100000 entries"),
        ({"aggregation": [[1.0] * 100_000] * 3}, "aggregation has more than 300000 entries"),
        ({"model_args": {"x": [{}] * 1000}}, "model_args has more than 1000 entries"),
        ({"pretrained_cfg": {"input_size": [3, 8, 8], "x": [[]] * 1000}}, "pretrained_cfg has more than 1000 entries"),
        ({"architecture": "hf-hub:evil/model"}, "timm has no model named"),
        ({"architecture": "local-dir:/etc"}, "timm has no model named"),
        ({"model_args": {"pretrained": True}}, "model_args must not hold pretrained"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args must not hold checkpoint_path"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}}, "must not hold pretrained_cfg_overlay"),
        ({"architecture": "test_vit", "model_args": {"depth": 10**9}}, "the numbers in model_args add up to"),
        ({"architecture": "test_vit", "model_args": {"depth": float("inf")}}, "the numbers in model_args add up to"),
        ({"architecture": "resnet50", "model_args": {"layers": [8000] * 4}}, "more than 6000 layers and blocks"),
        ({"model_args": {"x": json.loads("[" * 9 + "]" * 9)}}, "model_args is nested more than 8 times"),
        ({"architecture": "resnet" * 700_000}, "architecture has 4200000 characters"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": "huge"}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "std": [0, 1, 1]}}, "pretrained_cfg.std"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0, 1]}}, "pretrained_cfg.mean"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1e-9}}, "pretrained_cfg.crop_pct"),
        (
            {"pretrained_cfg": {"input_size": [3, 512, 512], "crop_pct": 0.1}},
            "enlarged to more than 2048 pixels a side",
        ),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "std": [1e-300] * 3}}, "pretrained_cfg.std"),
        ({"pretrained_cfg": {}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "interpolation": "evil"}}, "pretrained_cfg.interpolation"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_mode": ["evil"]}}, "pretrained_cfg.crop_mode"),
        ({"model_args": {"features_only": True}}, "model_args must not hold features_only"),
        ({"model_args": {"evil": 1}}, "timm can't build resnet20_cifar with .*evil"),
        ({"attn_implementation": "evil/kernel"}, "must not hold attn_implementation"),
        ({"_attn_implementation": "evil/kernel"}, "must not hold _attn_implementation"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "must not hold quantization_config"),
        ({"transformers_weights": "../x.safetensors"}, "must not hold transformers_weights"),
        ({"to_dict": "evil"}, "must not hold to_dict"),
        ({"model_type": "bert"}, "of the type 'bert', not 'ecl'"),
        ({"dtype": "evil"}, "evil"),
        ({"dtype": "float8_e4m3fn"}, "dtype must be one of"),
        ({"dtype": 7}, "dtype"),
        ({"problem_type": "regression"}, "problem_type"),
        ({"id2label": {"0": "a", "1": "b", "7": "c"}}, "id2label must name the classes 0, 1, 2"),
        ({"id2label": {"a": "a", "b": "b", "c": "c"}}, "describe an ECL model: invalid literal"),
        ({"id2label": ["a", "b", "c"]}, "id2label|describe an ECL model"),
        ({"id2label": {"0": "a", "1": None, "2": ["x"]}}, "id2label must hold names"),
        ({"id2label": None, "label2id": None, "class_counts": None, "num_labels": "x"}, "describe an ECL model"),
        ({"id2label": None, "label2id": None, "class_counts": None, "num_labels": 0}, "id2label must name the classes"),
        ({"class_counts": [10**400, 1, 1]}, "class_counts must be non-negative, at most"),
        ({"class_counts": [1, 2]}, "class_counts has 2 entries"),
        ({"classifier_scale": float("nan"), "classifier": "cosine"}, "classifier_scale"),
        ({"classifier_scale": 10**19, "classifier": "cosine"}, "classifier_scale"),
    ],
)
def test_absurd_configurations_are_refused(repository, changes, message):
    edit(repository / "config.json", **changes)
    for load in (ECLForImageClassification, AutoModelForImageClassification):
        if load is ECLForImageClassification or "model_type" not in changes:
            with pytest.raises(ValueError, match=message) as caught:
                load.from_pretrained(repository)
            assert str(repository) in str(caught.value)
            assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [None, "{}", "[]"])
def test_default_configuration_does_not_stand_in(tmp_path, content):
    ECLForImageClassification(ECLConfig()).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is missing, or is no JSON object"):
        ECLForImageClassification.from_pretrained(tmp_path)


@pytest.mark.slow
def test_code_of_a_repository_runs_on_request_only(repository, tmp_path):
    """In a process that does not know the package."""
    harm = tmp_path / "harm"
    file = repository / "modeling_ecl.py"
    file.write_text(f"open({str(harm)!r}, 'w').close()\n" + file.read_text())
    code = (
        "from transformers import AutoModelForImageClassification, AutoConfig\n"
        f"try:\n    AutoModelForImageClassification.from_pretrained({str(repository)!r}, trust_remote_code=False)\n"
        "except ValueError as error:\n    print('refused' if 'trust_remote_code' in str(error) else error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "refused"
    assert not harm.exists()
    AutoModelForImageClassification.from_pretrained(repository)  # with the package, the package's own code is used
    assert not harm.exists()


def test_good_repository_is_left_as_it_is(repository):
    before = {file: file.read_bytes() for file in repository.iterdir()}
    AutoConfig.from_pretrained(repository)
    AutoImageProcessor.from_pretrained(repository)
    model = ECLForImageClassification.from_pretrained(repository)
    assert {file: file.read_bytes() for file in repository.iterdir()} == before
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.is_tensor(model(torch.zeros(1, 3, 32, 32)).logits)
