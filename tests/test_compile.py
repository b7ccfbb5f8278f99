"""The task's forward is one graph: `torch.compile` finds nothing in it that it must leave to Python."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.collaborative import CollaborativeTask
from ecl_hf.memory import checkpoint_blocks, checkpoint_experts
from ecl_hf.methods import METHODS
from ecl_hf.recipe import LossConfig


@pytest.mark.parametrize(
    ("method", "saving"),
    [("ecl", []), ("ncl", []), ("ecl", [checkpoint_blocks, checkpoint_experts])],
)
def test_forward_is_one_graph(method, saving):
    config = ECLConfig(architecture="test_resnet", num_experts=2, class_counts=[9, 5, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS[method], LossConfig(queue_size=7)).train()
    for save in saving:
        save(task.model)
    views = torch.randn(2, 4, 3, 32, 32)
    batch = {"pixel_values": views[0], "labels": torch.arange(4) % 3, "contrast_pixel_values": views[1]}
    expected = task(**batch)["loss"]
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(task, backend=keep, fullgraph=True)
    assert_close(compiled(**batch)["loss"], expected)
    assert len(graphs) == 1
    compiled(**batch)
    assert len(graphs) == 1  # and it is used again
