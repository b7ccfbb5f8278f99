"""What `torch.compile` finds in the task: nothing that it must leave to Python, and the same encoder K times."""

import copy

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.memory import checkpoint_blocks, checkpoint_experts
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings


@pytest.mark.parametrize(
    ("method", "saving"),
    [("ecl", []), ("ncl", []), ("ecl", [checkpoint_blocks, checkpoint_experts])],
)
@pytest.mark.slow
def test_forward_is_one_graph(method, saving):
    config = ECLConfig(architecture="test_resnet", num_experts=2, class_counts=[9, 5, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS[method], ECLSettings(queue_size=7)).train()
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


@pytest.mark.slow
def test_compiled_encoders_share_their_graphs_and_give_the_same_gradients(monkeypatch):
    """With the graphs and gradients that Inductor gets, and without the minute that its compiler takes."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compile_module(module, backend="aot_eager"))
    torch.manual_seed(0)
    config = ECLConfig(architecture="test_resnet", num_experts=3, class_counts=[9, 5, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["ecl"], ECLSettings(queue_size=7)).train()
    views = torch.randn(2, 4, 3, 32, 32)
    batch = {"pixel_values": views[0], "labels": torch.arange(4) % 3, "contrast_pixel_values": views[1]}
    compiled = copy.deepcopy(task)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled.compile_encoders()
    for model in (task, compiled):
        model(**batch)["loss"].backward()
    assert counters["stats"]["unique_graphs"] == 2  # experts, key encoders
    for expected, ours in zip(task.parameters(), compiled.parameters(), strict=True):
        assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-4)
    for expected, ours in zip(task.buffers(), compiled.buffers(), strict=True):
        assert_close(ours, expected)
    compiled.eval()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        compiled.model(torch.randn(5, 3, 32, 32))
    assert counters["stats"]["unique_graphs"] == 2
    assert list(compiled.state_dict()) == list(task.state_dict())
