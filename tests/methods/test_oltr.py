"""Open long-tailed recognition: published values of its loss and its head, and their extremes."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification, losses
from ecl_hf.backbones import ModulatedAttention
from ecl_hf.heads import ECLMemoryHead
from ecl_hf.learning.stages import begin_heads
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import EpochContext, HeadContext, PartsContext, Time
from ecl_hf.methods.oltr import Memory, OLTRSettings, centroid_loss, with_memory
from ecl_hf.publishing.hub import save_timm
from tests.methods.comparing import agrees, tensors


@pytest.fixture
def values(published):
    return tensors(published("features_and_teachers/oltr"))


def head_of(values):
    centroids = values["centroids"]
    head = ECLMemoryHead(centroids.shape[1], centroids.shape[0], scale=16.0).double()
    state = {f"probabilities.{key}": values[f"hallucinator_{key}"] for key in ("weight", "bias")}
    state |= {f"selector.{key}": values[f"selector_{key}"] for key in ("weight", "bias")}
    head.load_state_dict(state | {"memory": centroids, "weight": values["cosine_weight"]})
    return head


def test_published_centroid_loss(values):
    cases = [key.removesuffix("_loss") for key in values if key.startswith("dcl_") and key.endswith("_loss")]
    assert cases
    for case in cases:
        centroids = values["centroids"] * values[f"{case}_centroid_scale"]
        weight = values[f"{case}_criterion_weight"].item()
        leaves = [x.clone().requires_grad_() for x in (values["features"], centroids)]
        loss = centroid_loss(leaves[0], values["labels"], leaves[1], weight)
        assert_close(loss, values[f"{case}_loss"], rtol=1e-9, atol=0)
        for name, gradient in zip(("features", "centroids"), torch.autograd.grad(loss, leaves), strict=True):
            assert_close(gradient, values[f"{case}_grad_{name}"], rtol=1e-9, atol=1e-12)


def test_published_head(values):
    head = head_of(values)
    assert_close(head(values["features"]), values["meta_logits"])

    def loss(features):
        return losses.cross_entropies(head(features), values["labels"]).mean()

    expected = loss(values["features"]).detach()
    agrees(loss, values["features"], expected, values["meta_ce_grad_features"])
    assert head.memory.grad is None


def test_far_centroids_do_not_repel():
    features, centroids = torch.randn(6, 4).double(), torch.randn(5, 4).double() + 100
    labels = torch.tensor([0, 0, 1, 3, 1, 0])
    expected = (features - centroids[labels]).square().sum(-1).mean() / 2
    assert_close(centroid_loss(features, labels, centroids, 1.0), expected)


def test_near_centroids_repel_up_to_the_margin():
    features, centroids = torch.zeros(6, 4).double(), torch.zeros(5, 4).double()
    assert_close(centroid_loss(features, torch.tensor([0] * 6), centroids, 1.0).item(), 0.01 * 10)


def test_the_answer_is_that_of_the_enriched_feature(values):
    """Reach and squash only make it more or less sure."""
    head = head_of(values)
    features = torch.randn(40, head.in_features, dtype=torch.double)
    remembered = head.probabilities(features).softmax(-1) @ head.memory
    x = features + head.selector(features).tanh() * remembered
    expected = (x @ F.normalize(head.weight, dim=-1).T).argmax(-1)
    assert torch.equal(head(features).argmax(-1), expected)


def test_a_feature_on_its_centroid_has_finite_logits():
    head = ECLMemoryHead(4, 3, scale=16.0)
    assert head(head.memory).isfinite().all()


def test_the_memory_begins_with_the_class_means_behind_the_new_layer():
    config = ECLConfig(architecture="resnet20_cifar", num_experts=1, class_counts=[4, 2, 0])
    model = ECLForImageClassification(config)
    first = model.experts[0].head
    head = model.experts[0].head = with_memory(first, HeadContext(OLTRSettings(), torch.tensor([4, 2, 0])))
    assert torch.equal(head.classifier.probabilities.weight, first.weight)
    labels = torch.tensor([0, 0, 1, 0, -1, 1, 0])
    features = torch.randn(7, 1, 64)
    part = Memory(PartsContext(model, OLTRSettings(), torch.tensor([4, 2, 0]), labels))

    def context(epoch):
        counts = torch.tensor([4, 2, 0])
        return EpochContext(Time(epoch, 3), model, OLTRSettings(), counts, lambda: (labels, None, features))

    part.before_epoch(context(0))
    embedded = F.relu(F.linear(features[:, 0], head.neck.weight, head.neck.bias))
    for c in (0, 1):
        assert_close(head.classifier.memory[c], embedded[labels == c].mean(0))
    assert (head.classifier.memory[2] == 0).all()
    before = head.classifier.memory.clone()
    features = features + 1
    part.before_epoch(context(1))  # afterwards only the loss moves them
    assert torch.equal(head.classifier.memory, before)


def test_published_attention(values):
    attention = ModulatedAttention(4, 7, 7).double()
    names = {name: name.replace(".", "_") for name in attention.state_dict()}
    attention.load_state_dict({name: values[f"att_{key}"] for name, key in names.items()})
    assert_close(attention(values["att_input"]), values["att_output"])
    places = attention.fc_spatial(values["att_input"].flatten(1)).softmax(-1)
    assert_close(places.unflatten(-1, (7, 7)), values["att_spatial"])


@pytest.fixture
def attentive():
    """A model as the second stage begins with it, and its logits at the end of the first one."""
    torch.manual_seed(0)
    config = ECLConfig(architecture="resnet20_cifar", num_experts=1, class_counts=[4, 2, 1])
    config.pretrained_cfg = {"input_size": [3, 16, 24], "mean": [0.5] * 3, "std": [0.5] * 3}
    model = ECLForImageClassification(config).eval()
    pictures = torch.randn(2, 3, 16, 24)
    before = model(pictures, output_features=True).features
    begin_heads(model, METHODS["oltr"].stages[1], OLTRSettings(attention=True))
    return model, pictures, before


def test_attention_begins_as_an_identity_and_is_published(attentive, tmp_path):
    model, pictures, before = attentive
    assert model.config.attention_map == [4, 6]
    assert_close(model(pictures, output_features=True).features, before)
    torch.nn.init.normal_(model.experts[0].backbone.global_pool[0].conv_mask.weight)
    out = model(pictures, output_features=True)
    assert not torch.allclose(out.features, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(ECLForImageClassification.from_pretrained(tmp_path)(pictures).logits, out.logits)
    with pytest.raises(ValueError, match="attention is made for maps of"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no attention before their pooling"):
        save_timm(model, 0, tmp_path / "timm")


def test_attention_moves_as_the_encoder_does(attentive):
    model, pictures, _ = attentive
    task = CollaborativeTask(model, METHODS["oltr"], OLTRSettings(attention=True), stage=1).train()
    task(pictures, torch.tensor([0, 2]))["loss"].backward()
    name = "model.experts.0.backbone.global_pool.0.conv_mask.weight"
    assert dict(task.named_parameters())[name].grad.abs().sum() > 0
    assert METHODS["oltr"].stages[1].lr_factor(name, None, model) == 0.1


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_encoders_that_can_have_no_attention_are_refused_before_the_first_stage(architecture):
    config = ECLConfig(architecture=architecture, num_experts=1, class_counts=[4, 2, 1])
    model = ECLForImageClassification(config)
    with pytest.raises(ValueError, match=f"loss.attention: {architecture}.* pools no map"):
        CollaborativeTask(model, METHODS["oltr"], OLTRSettings(attention=True))
