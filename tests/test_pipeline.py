"""The ensemble's own pipeline, and what its output says about uncertainty."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from torch.testing import assert_close
from transformers import pipeline

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.modeling_ecl import expert_disagreement
from ecl_hf.pipeline import ECLImageClassificationPipeline

NAMES = ["oak", "ash tree", "ginkgo"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = ECLConfig(
        architecture="resnet20_cifar", num_experts=3, class_counts=[90, 9, 1], id2label=dict(enumerate(NAMES))
    )
    model = ECLForImageClassification(config).eval()
    for k, expert in enumerate(model.experts):
        torch.nn.init.normal_(expert.head.weight, std=1.0 + k)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, directory


def pictures(count=3):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def classify(directory, **kwargs):
    return pipeline(
        "image-classification", model=str(directory), pipeline_class=ECLImageClassificationPipeline, **kwargs
    )


def scores(answers):
    return [[{a["label"]: a["score"] for a in answer}[name] for name in NAMES] for answer in answers]


def test_disagreement_is_the_jensen_shannon_divergence():
    logits = torch.randn(6, 2, 5) * 3
    expected = [jensenshannon(*softmax(pair.double().numpy(), axis=-1)) ** 2 for pair in logits]
    assert_close(expert_disagreement(logits), torch.tensor(expected).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_disagreement_lies_between_zero_and_log_k(num_experts):
    same = torch.randn(4, 1, 7).expand(4, num_experts, 7)
    assert_close(expert_disagreement(same), torch.zeros(4), atol=1e-6, rtol=0)
    apart = 200 * torch.eye(7)[None, :num_experts]
    assert_close(expert_disagreement(apart), torch.tensor([math.log(num_experts)]))
    assert expert_disagreement(same.half()).dtype == torch.float32


def test_flip_is_the_mean_of_both_images(saved):
    model, _ = saved
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain, mirrored, both = model(x), model(x.flip(-1)), model(x, flip=True, output_features=True)
        assert torch.equal(both.expert_logits, (plain.expert_logits + mirrored.expert_logits) / 2)
        assert torch.equal(both.logits, both.expert_logits.mean(1))
        assert torch.equal(both.features, model(x, output_features=True).features)


def test_without_requests_it_is_the_stock_pipeline(saved):
    _, directory = saved
    stock = pipeline("image-classification", model=str(directory))
    assert classify(directory)(pictures()) == stock(pictures())


def test_flip_prior_and_disagreement_on_request(saved):
    model, directory = saved
    run = classify(directory)
    prior = [0.2, 0.0, 0.8]
    answers = run(pictures(), flip=True, target_prior=prior, disagreement=True, batch_size=2)
    pixels = torch.cat([run.image_processor(picture, return_tensors="pt").pixel_values for picture in pictures()])
    with torch.no_grad():
        expected = model(pixels, flip=True, target_prior=prior)
    assert_close(torch.tensor(scores(answers)), expected.logits.softmax(-1))
    for answer, value in zip(answers, expected.disagreement, strict=True):
        assert [a["disagreement"] for a in answer] == pytest.approx([value.item()] * len(NAMES))
    assert "disagreement" not in run(pictures(1))[0][0]


def test_options_given_when_the_pipeline_is_made(saved):
    _, directory = saved
    prior = {"ginkgo": 0.8, "oak": 0.2}
    made = classify(directory, target_prior=prior, disagreement=True, top_k=2)
    assert made(pictures()) == classify(directory)(pictures(), target_prior=[0.2, 0, 0.8], disagreement=True, top_k=2)


def test_name_of_two_classes_in_the_prior_is_refused(saved):
    run = classify(saved[1])
    run.model.config.id2label = {0: "crane", 1: "crane", 2: "oak"}  # the bird and the machine
    with pytest.raises(ValueError, match="names 'crane', as several classes are called"):
        run(pictures(), target_prior={"crane": 0.5, "oak": 0.5})


def test_unknown_class_in_the_prior_is_named(saved):
    with pytest.raises(ValueError, match="does not know: elm"):
        classify(saved[1])(pictures(), target_prior={"elm": 1.0})


def test_a_prior_that_is_no_number_is_named(saved):
    with pytest.raises(ValueError, match=r"target_prior\['oak'\] must be a number, not 'often'"):
        classify(saved[1])(pictures(), target_prior={"oak": "often"})
