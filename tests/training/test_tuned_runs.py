"""Runs that train small additions to a pretrained transformer: what is published, and going on where a run stopped."""

import json

import pytest
import timm
import torch
from export import main as export
from safetensors.torch import load_file, save_file
from train import main

from ecl_hf import ECLForImageClassification
from tests.training.test_train_script import TINY, assert_same_run, fresh_accelerate  # noqa: F401 (a fixture)

ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights of a small transformer, by timm's names."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **ARGS).state_dict(), file)
    return file


@pytest.fixture
def train(pretrained, tmp_path):
    def run(name, *flags):
        model = ["--model.architecture=vit_tiny_patch16_224", f"--model.args={json.dumps(ARGS)}"]
        more = [f"--model.pretrained={pretrained}", "--method=ecl", "--loss.queue_size=40", "--model.num_experts=2"]
        return main([*TINY, *model, *more, "--optim.lr=0.05", f"--output_dir={tmp_path / name}", *flags])

    return run


@pytest.mark.slow
def test_low_rank_run_resumes_bit_by_bit_and_becomes_a_plain_timm_model(train, pretrained, tmp_path):
    flags = ["--model.tune=lora", "--model.rank=2", "--epochs=2", "--train.checkpoint_every=1", "--optim.ema=0.9"]
    whole = train("whole", *flags)
    steps = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])["step"]
    train("parts", *flags, f"--train.max_steps={steps + 2}")
    assert_same_run(whole, train("parts", *flags, "--resume"))
    model, before = ECLForImageClassification.from_pretrained(whole / "model").eval(), load_file(pretrained)
    after = model.experts[0].backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert after.keys() == before.keys()
    assert moved == {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    for name in moved:
        assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), atol=1e-6) == 2
    results = json.loads((whole / "results.json").read_text())
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    export([f"--run={whole}", f"--output={tmp_path / 'timm'}", "--timm", "--expert=1"])
    plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain(image), model(image).expert_logits[:, 1], rtol=1e-4, atol=1e-5)


def test_adapters_are_published_and_refused_by_timm(train, pretrained, tmp_path):
    run = train("run", "--model.tune=adapter", "--epochs=1")
    model, before = ECLForImageClassification.from_pretrained(run / "model").eval(), load_file(pretrained)
    assert model.config.adapter_rank == 2  # 10 classes, 2 blocks
    after = model.experts[1].backbone.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name.replace("mlp.", "mlp.mlp.").replace("norm2.", "mlp.norm2.")], tensor)
    assert after["blocks.1.mlp.adapter.up.weight"].any()
    export([f"--run={run}", f"--output={tmp_path / 'ecl'}"])
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        copied = ECLForImageClassification.from_pretrained(tmp_path / "ecl")
        torch.testing.assert_close(copied(image).logits, model(image).logits)
    with pytest.raises(SystemExit, match="can't be a plain timm model"):
        export([f"--run={run}", f"--output={tmp_path / 'timm'}", "--timm"])


def test_encoder_that_is_not_pretrained_is_refused(train, tmp_path):
    with pytest.raises(SystemExit, match=r"set model\.pretrained"):
        train("run", "--model.tune=lora", "--model.pretrained=false")
    assert not (tmp_path / "run").exists()
