"""Which prior the published logits carry: experts that fit their shifted losses give Bayes' answer for any test set."""

import math

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.methods import METHODS

COUNTS = [60, 25, 14, 9, 3]
PRIOR = [n / sum(COUNTS) for n in COUNTS]
UPSIDE_DOWN = PRIOR[::-1]


def sade(c, tau):
    return [0.0, math.log(PRIOR[c]), math.log(PRIOR[c]) - tau * math.log(UPSIDE_DOWN[c])]


def in_proportion(*strengths):
    return lambda c: [strength * math.log(PRIOR[c]) for strength in strengths]


# Method with settings: what its paper adds to the three experts' logits of class c
CASES = {
    "sade, 2": ({"tau": 2.0}, lambda c: sade(c, 2.0)),
    "sade, 1": ({"tau": 1.0}, lambda c: sade(c, 1.0)),
    "balpoe": ({}, in_proportion(0, 1, 2)),
    "balpoe, ImageNet-LT": ({"most_tau": 2.5}, in_proportion(0, 1.25, 2.5)),
    "mdcs": ({}, in_proportion(-0.5, 1, 2.5)),
    "tcl": ({}, in_proportion(0.9, 1, 1.1)),
    "tcl, more": ({"most_tau": 1.5}, in_proportion(0.9, 1.2, 1.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_target_prior_gives_the_posterior_of_the_test_set(case, monkeypatch):
    changes, shifts = CASES[case]
    method = METHODS[case.partition(",")[0]]
    config = ModelConfig(architecture="resnet20_cifar", image_size=8)
    model = initialise_model(config, method, COUNTS, list("abcde"), method.settings(**changes)).eval()
    likelihoods = torch.rand(6, 5, dtype=torch.double) + 0.01
    logits = torch.tensor(  # an expert that fits has z_k + b_k = log of the prior times the likelihood
        [
            [[math.log(PRIOR[c] * likelihood) - shifts(c)[k] for c, likelihood in enumerate(row)] for k in range(3)]
            for row in likelihoods.tolist()
        ]
    )
    monkeypatch.setattr(model, "_run_experts", lambda _: (torch.zeros(6, 3, 1), logits))
    for target in (PRIOR, [0.2] * 5, [0.05, 0.1, 0.5, 0.15, 0.2]):
        found = model(torch.zeros(6, 3, 8, 8), target_prior=target).logits.softmax(-1)
        expected = torch.tensor(target, dtype=torch.double) * likelihoods
        assert_close(found.double(), expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
