"""Balanced softmax and its meta sampler: published values, torch's Gumbel softmax, differences of the meta loss."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import balms
from tests.methods.comparing import agrees, tensors

RATES = torch.tensor([0.9, 0.2, 0.5, 0.5, 0.1], dtype=torch.double)


def test_published_balanced_softmax(published):
    values = tensors(published("reweighting_and_stages/balanced_softmax"))
    labels, shift = values["labels"], values["class_counts"].double().log()

    def images(logits):
        return losses.cross_entropies(logits, labels, shift)

    agrees(images, values["logits"], values["loss_none"], values["grad_none"])
    for mean in (lambda z: images(z).mean(), lambda z: losses.balanced_cross_entropy(z, labels, shift)):
        agrees(mean, values["logits"], values["loss_mean"], values["grad_mean"])


def test_published_loss_of_the_drawn_pictures(published):
    values = tensors(published("reweighting_and_stages/balms_meta_sampler"))
    log_rates = F.logsigmoid(values["onehot_all"] @ values["weight"][0])
    drawn = values["sample_matrix"].argmax(-1)
    probabilities = balms.draw_probabilities(log_rates, balms.conditional_noise(log_rates, drawn), drawn)
    actual = balms.drawn_loss(values["per_sample_loss"], probabilities)
    assert_close(actual, values["meta_inner_loss"], rtol=1e-9, atol=0)


def test_the_slope_is_that_of_a_hard_gumbel_softmax():
    log_rates, images = RATES.log().requires_grad_(), torch.rand(7, dtype=torch.double)
    torch.manual_seed(3)
    noise = -torch.empty(7, 5, dtype=torch.double).exponential_().log()
    torch.manual_seed(3)
    draw = F.gumbel_softmax(log_rates.expand(7, 5), hard=True)
    drawn = draw.argmax(-1)
    expected = (images[:, None] * draw.detach() * draw).sum(-1).mean()
    actual = balms.drawn_loss(images, balms.draw_probabilities(log_rates, noise, drawn))
    assert_close(actual, expected)
    slopes = (torch.autograd.grad(loss, log_rates)[0] for loss in (actual, expected))
    assert_close(*slopes)


def test_noise_given_the_draw_is_gumbel_noise_whose_draw_it_was():
    drawn = torch.multinomial(RATES, 40_000, replacement=True)
    noise = balms.conditional_noise(RATES.log(), drawn)
    assert torch.equal((RATES.log() + noise).argmax(-1), drawn)
    # Over all draws: P(noise < g) = exp(-exp(-g)) for each picture
    for point in (-0.5, 0.4, 2.0):
        share = (noise < point).double().mean(0)
        expected = torch.tensor(-point, dtype=torch.double).exp().neg().exp()
        assert_close(share, expected.expand(5), rtol=0, atol=0.015)


def test_gradient_of_the_meta_loss_by_differences():
    torch.manual_seed(1)
    head, shift = nn.Linear(4, 3).double(), torch.tensor([2.0, 1.0, 0.0], dtype=torch.double)
    features, balanced = torch.randn(2, 6, 4, dtype=torch.double)
    labels, balanced_labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 0, 1, 2])

    def by_hand(shares):
        """A step by the closed form of the gradient, with these shares of the pictures."""
        with torch.no_grad():
            slopes = (head(features) + shift).softmax(-1) - F.one_hot(labels)
            slopes = shares[:, None] * slopes / 6
            weight, bias = head.weight - 0.3 * slopes.T @ features, head.bias - 0.3 * slopes.sum(0)
            return F.cross_entropy(F.linear(balanced, weight, bias), balanced_labels)

    probabilities = torch.rand(6, dtype=torch.double, requires_grad=True)
    loss = balms.meta_loss(head, features, labels, shift, probabilities, balanced, balanced_labels, 0.3)
    assert_close(loss, by_hand(torch.ones(6, dtype=torch.double)))
    (actual,) = torch.autograd.grad(loss, probabilities)
    moves = 1e-5 * torch.eye(6, dtype=torch.double)
    expected = torch.stack([(by_hand(1 + move) - by_hand(1 - move)) / 2e-5 for move in moves])
    assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    assert head.weight.grad is None


def test_rates_move_by_adam_and_are_drawn_by_from_the_next_epoch_on():
    labels, settings = torch.tensor([0, 2, 2, 1]), balms.BALMSSettings(rate_lr=0.05)
    context = SimpleNamespace(class_counts=torch.tensor([1, 1, 2]), labels=labels, settings=settings)
    part, scores = balms.RateLearner(context), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for gradient in torch.randn(3, 3):
        part.gradient, scores.grad = gradient, gradient
        part.after_step()
        optimizer.step()
    assert_close(part.scores, scores.detach())
    assert_close(part.picture_weights, torch.full((4,), 0.5))
    part.before_epoch(context)
    assert_close(part.picture_weights, scores.detach().sigmoid()[labels])
    again = balms.RateLearner(context)
    again.load_state_dict(part.state_dict())
    for learner in (part, again):
        learner.gradient = torch.ones(3)
        learner.after_step()
    assert_close(again.scores, part.scores, rtol=0, atol=0)


def test_the_term_moves_rates_towards_draws_that_help():
    """Class 1 is drawn rarely and unlearned; the balanced batch asks for it."""
    torch.manual_seed(0)
    labels = torch.tensor([0] * 9 + [1])
    context = SimpleNamespace(class_counts=torch.tensor([9, 1]), labels=labels, settings=balms.BALMSSettings())
    part, head = balms.RateLearner(context), nn.Linear(2, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    features = F.one_hot(labels).float()
    partner = SimpleNamespace(features=torch.eye(2)[None])
    out = SimpleNamespace(
        parts={"meta": part},
        heads=(head,),
        features=features[None],
        labels=labels,
        indices=torch.arange(10),
        log_prior_shift=torch.zeros(2),
        partner=partner,
        partner_labels=torch.tensor([0, 1]),
    )
    slopes = []
    for _ in range(200):
        loss = balms.META.loss(out, context.settings)
        slopes.append(part.gradient)
    assert not loss.requires_grad
    slope = torch.stack(slopes).mean(0)
    assert slope[1] < 0 < slope[0]
