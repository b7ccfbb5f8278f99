"""What is drawn, read back from the figures' artists; pixels are nobody's business."""

import io
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ecl_hf.evidence import plots
from ecl_hf.evidence.plots import models
from ecl_hf.evidence.plots.classes import block_sums
from ecl_hf.evidence.plots.style import GROUP_COLOURS, smooth

COUNTS = [30, 200, 5]
NAMES = ["cat", "dog", "owl"]  # dog, cat, owl from many to few
RANKED = [1, 0, 2]


def lines(axes, label):
    """Data of the line with this label."""
    line = next(line for line in axes.lines if line.get_label() == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def test_class_histogram():
    axes = plots.plot_class_histogram(COUNTS, NAMES).axes[0]
    bars = sorted((bar.get_x(), bar.get_height(), to_hex(bar.get_facecolor()).upper()) for bar in axes.patches)
    assert [height for _, height, _ in bars] == [200, 30, 5]
    assert [colour for *_, colour in bars] == [GROUP_COLOURS[group] for group in ("many", "medium", "few")]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dog", "cat", "owl"]
    assert axes.get_legend().get_texts()[0].get_text() == "many: 1 classes, 200 images"


@pytest.mark.parametrize(
    "draw",
    [
        lambda names: plots.plot_class_histogram(COUNTS, names),
        lambda names: plots.plot_feature_distance({"a": np.ones((1, 3))}, COUNTS, names),
        lambda names: plots.plot_transfer({"a": np.ones(3)}, {}, {"a": np.ones(3)}, COUNTS, names, [1, 1, 1]),
        lambda names: plots.plot_confusion({"a": np.ones((3, 3), int)}, COUNTS, names),
    ],
)
def test_names_of_classes_are_not_cut_off(draw):
    figure = draw([f"{letter * 200}" for letter in "abc"])
    figure.draw_without_rendering()
    labels = [label for axes in figure.axes for label in axes.get_xticklabels() if label.get_text()]
    assert any(len(label.get_text()) > 15 for label in labels)
    width, height = figure.bbox.size
    for label in labels:
        box = label.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


def test_class_accuracy():
    figure = plots.plot_class_accuracy({"a": np.array([0.5, 0.9, np.nan]), "b": np.array([0.1, 0.2, 0.3])}, COUNTS)
    x, y = lines(figure.axes[0], "a")
    assert x.tolist() == [200, 30, 5]
    assert y[:2].tolist() == [90, 50]
    assert np.isnan(y[2])
    assert legend(figure) == ["a", "b"]


def test_training_has_a_panel_for_each_term_of_any_run():
    runs = {
        "a": [{"epoch": 1, "loss": 3.0, "supervision": 2.0, "lr": 0.1}, {"epoch": 2, "loss": 2.0, "supervision": 1.0}],
        "b": [{"epoch": 1, "loss": 5.0, "contrastive": 4.0, "images_per_second": 7.0, "note": "text"}],
    }
    figure = plots.plot_training(runs)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "supervision", "contrastive"]
    assert [values.tolist() for values in lines(figure.axes[0], "a")] == [[1, 2], [3, 2]]
    assert lines(figure.axes[1], "b")[0].size == 0
    assert [line.get_marker() for line in figure.axes[0].lines] == ["None", "o"]  # no line goes through one point


def test_what_no_training_logged_is_left_out_or_harmless(monkeypatch):
    monkeypatch.setattr(models, "MOST_TERMS", 4)
    names = ["\x01\x1b[31m</svg>", "x" * 999, "损失", *(f"term {n}" for n in range(99))]
    values = [1.0, float("nan"), 10**400, "text", True, None]
    log = [{"epoch": n, **dict.fromkeys(names, value)} for n, value in enumerate(values, 1)]
    log.append({"epoch": 10**400, names[0]: 2.0})
    long = [{"epoch": n, "loss": 1.0} for n in range(1, 20_000)]
    figure = plots.plot_training({"a": log, "b": long, "c": [{"epoch": 1, "loss": "text"}]})
    assert len(figure.axes) == 4
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["??[31m</svg>", f"{'x' * 19}…{'x' * 20}", "??"]
    assert [values.tolist() for values in lines(figure.axes[0], "a")] == [[1], [1]]
    assert sum(len(line.get_xdata()) for axes in plots.plot_training({"b": long}).axes for line in axes.lines) <= 2000
    drawing = io.StringIO()
    plots.plot_training({"a": [{"epoch": 1, names[0]: 1.0, names[2]: 2.0}]}).savefig(drawing, format="svg")
    ElementTree.fromstring(drawing.getvalue())
    assert len(plots.plot_training({"c": [{"epoch": 1, "loss": "text"}]}).axes) == 1


def test_transfer():
    figure = plots.plot_transfer(
        {"a": np.array([1.0, 2, 3]), "b": np.array([4.0, 5, 6])},
        {"b": np.array([1.1, 1.2, 1.3])},
        {"a": np.array([10, 20, 30]), "b": np.array([5, 50, 5])},
        *(COUNTS, NAMES, [20, 10, 30]),
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["transferred logit value", "transfer weight (Eq. 6)", "number of predictions"]
    assert lines(figure.axes[0], "a")[1].tolist() == [2, 1, 3]
    assert lines(figure.axes[1], "b")[1].tolist() == [1.2, 1.1, 1.3]
    assert lines(figure.axes[2], "b")[1].tolist() == [50, 5, 5]
    assert [10, 20, 30] in [list(line.get_ydata()) for line in figure.axes[2].lines]
    without = plots.plot_transfer({"a": np.ones(3)}, {}, {"a": np.ones(3)}, COUNTS, NAMES, [1, 1, 1])
    assert len(without.axes) == 2


def draw_methods(*points):
    """The axes, and its names with the points that they belong to."""
    rows = [{"method": m, "many": x, "many_std": None, "few": y, "few_std": 1.0} for m, x, y in points]
    axes = plots.plot_methods(rows).axes[0]
    return axes, {text.get_text(): text for text in axes.texts if text.get_text()}


def test_methods_that_none_is_ahead_of_have_a_colour():
    axes, names = draw_methods(("a", 70.0, 10.0), ("b", 60.0, 20.0), ("c", 60.0, 5.0), ("d", 60.0, 5.0))
    assert {name: text.xy for name, text in names.items()} == {"a": (70, 10), "b": (60, 20), "c, d": (60, 5)}
    colours = [bars.lines[0].get_color() for bars in axes.containers]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_names_of_close_methods_cover_nothing():
    points = [(f"a_method_with_a_long_name_{i}", 50 + 0.3 * (i % 4), 20 + 0.2 * (i // 4)) for i in range(12)]
    axes, names = draw_methods(*points, ("near 0", 0.0, 0.0), ("above", 30.0, 40.0))
    boxes = [text.get_window_extent() for text in names.values()]
    assert len(boxes) == 14
    for i, box in enumerate(boxes):
        assert axes.bbox.contains(*box.min)
        assert axes.bbox.contains(*box.max)
        assert not box.count_overlaps(boxes[:i])
        assert not any(box.contains(*axes.transData.transform(point[1:])) for point in points)


def test_expert_number_and_loss_weights():
    rows = [
        {"experts": k, "model": model, "top1": 40.0 + k, "top1_std": 1.0, "few": None, "few_std": None}
        for k in (1, 3)
        for model in ("ensemble", "one expert (mean)")
    ]
    figure = plots.plot_expert_number(rows)
    assert len(figure.axes) == 1  # no few-shot class
    bars = figure.axes[0].containers[0]
    assert [values.tolist() for values in bars.lines[0].get_data()] == [[1, 3], [41, 43]]
    assert bars.lines[2][0].get_segments()[0][:, 1].tolist() == [40, 42]
    figure = plots.plot_expert_number([row | {"few": 9.0, "few_std": None} for row in rows])
    assert [axes.get_title() for axes in figure.axes] == ["top-1 in %", "few-shot accuracy in %"]
    sweep = [
        {"swept": name, "value": value, "model": "ensemble", "top1": 50 + value, "top1_std": None}
        for name, value in (("alpha", 0.0), ("alpha", 0.6), ("beta", 1.0))
    ]
    figure = plots.plot_loss_weights(sweep)
    assert [[v.tolist() for v in axes.containers[0].lines[0].get_data()] for axes in figure.axes] == [
        [[0, 0.6], [50, 50.6]],
        [[1], [51]],
    ]


def test_tsne_draws_each_point_in_its_class():
    points, labels = np.random.default_rng(0).normal(size=(9, 2)), np.array([0, 1, 2] * 3)
    figure = plots.plot_tsne({"a": (points, labels), "b": (points + 1, labels)}, COUNTS, NAMES)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert legend(figure) == ["dog (200)", "cat (30)", "owl (5)"]
    for scatter, c in zip(figure.axes[0].collections, RANKED, strict=True):
        assert np.array_equal(scatter.get_offsets(), points[labels == c])


def test_feature_distance_has_a_panel_for_each_pair():
    three, two = np.arange(9.0).reshape(3, 3), np.array([[7.0, 8, 9]])
    figure = plots.plot_feature_distance({"a": three, "b": two}, COUNTS, NAMES)
    assert [axes.get_title() for axes in figure.axes] == ["experts 0 and 1", "experts 0 and 2", "experts 1 and 2"]
    for axes, row in zip(figure.axes, three, strict=True):
        assert lines(axes, "a")[1].tolist() == row[RANKED].tolist()
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > three.max()
    assert lines(figure.axes[0], "b")[1].tolist() == [8, 7, 9]
    assert np.isnan(lines(figure.axes[2], "b")[1]).all()


def test_landscape():
    magnitudes, loss, accuracy = np.array([-1, 0, 1.0]), np.array([[3, 1, 3], [5, 1, 5.0]]), np.full((2, 3), 0.5)
    figure = plots.plot_landscape({"a": (magnitudes, loss, accuracy), "b": (magnitudes, loss + 1, accuracy)})
    assert len(figure.axes) == 4
    curves = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert curves == [[3, 1, 3], [5, 1, 5], [4, 1, 4]]  # directions, then their mean
    assert [line.get_ydata().tolist() for line in figure.axes[2].lines] == [[50] * 3] * 3
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_reliability():
    table = {"share": [0.0, 0.25, 0.75], "confidence": [None, 0.5, 0.9], "accuracy": [None, 0.6, 0.7]}
    figure = plots.plot_reliability({"a": table}, {"a": 0.175})
    axes = figure.axes[0]
    assert axes.get_title() == "a\nECE 17.5 %"
    accuracy, over, under = ([bar.get_height() for bar in group] for group in axes.containers)
    assert accuracy[1:] == [0.6, 0.7]
    assert over[1:] == pytest.approx([0, 0.2])
    assert under[1:] == pytest.approx([0.1, 0])
    assert axes.containers[1][2].get_y() == 0.7
    assert lines(axes, "share of the images")[1].tolist() == table["share"]


def test_confusion_has_truth_across_and_prediction_upwards():
    matrix = np.array([[10, 0, 2], [1, 20, 0], [0, 5, 3]])  # rows: truth
    figure = plots.plot_confusion({"a": matrix}, COUNTS, NAMES)
    image = figure.axes[0].images[0]
    drawn = np.expm1(np.asarray(image.get_array()))
    for x, truth in enumerate(RANKED):
        for y, prediction in enumerate(RANKED):
            assert drawn[y, x] == pytest.approx(matrix[truth, prediction])
    assert image.origin == "lower"


@pytest.mark.parametrize("size", [3, 200, 201, 1000, 8142])
def test_block_sums_lose_no_image(size):
    matrix = np.zeros((size, size))
    matrix[0, -1], matrix[-1, 0], matrix[size // 2, size // 2] = 1, 2, 4
    blocks = block_sums(matrix)
    assert blocks.shape == (min(size, 200),) * 2
    assert blocks.sum() == 7
    assert (blocks[0, -1], blocks[-1, 0]) == (1, 2)


def test_posthoc_and_shifted():
    curves = {"taus": [0.0, 1.0], "ensemble": [0.4, 0.5], "experts": [[0.3, 0.4]]}
    axes = plots.plot_posthoc({"a": (curves, 1.0), "b": (curves, None)}).axes[0]
    assert lines(axes, "a")[1].tolist() == [40, 50]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[1.0, 1.0]]
    rows = [
        {"direction": d, "factor": f, "top1": 0.3, "top1_target_prior": 0.4}
        for d, f in (("forward", 50.0), ("uniform", 1.0), ("backward", 50.0))
    ]
    axes = plots.plot_shifted({"a": rows}).axes[0]
    assert lines(axes, "a, target prior")[1].tolist() == [40] * 3
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50", "uniform", "50"]


def test_smooth():
    assert smooth(np.array([1.0, 2, 6]), 3).tolist() == [1.5, 3, 4]
    assert smooth(np.array([np.nan, 2, 6]), 3)[1:].tolist() == [4, 4]
    assert np.isnan(smooth(np.array([np.nan, np.nan]), 1)).all()


@pytest.mark.parametrize("classes", [100, 8142])
def test_many_classes_are_drawn_without_their_names(classes, tmp_path):
    random = np.random.default_rng(0)
    counts = [max(2, int(1000 * 0.999**c)) for c in range(classes)]
    names = [f"class {c}" for c in range(classes)]
    values = {"a": random.random(classes), "b": random.random(classes)}
    figures = [
        plots.plot_class_histogram(counts, names),
        plots.plot_class_accuracy(values, counts),
        plots.plot_transfer(values, {}, values, counts, names, [3] * classes),
        plots.plot_feature_distance({"a": random.random((3, classes))}, counts, names),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "x.png", dpi=40)
        for axes in figure.axes:
            assert len(axes.get_xticklabels()) < 20


def test_same_arrays_give_the_same_file_and_leave_the_style_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("a.svg", "b.svg"):
        plots.plot_class_histogram(COUNTS, NAMES).savefig(tmp_path / name, metadata={"Date": None})
    assert dict(matplotlib.rcParams) == before
    assert "pyplot" not in str(type(plots.plot_class_histogram(COUNTS, NAMES).canvas))
    assert isinstance(plots.plot_class_histogram(COUNTS, NAMES), Figure)


def test_names_are_written_out(tmp_path):
    """Dollars would be a formula, mostly a wrong one; a legend leaves out what begins with an underscore."""
    names = ["_rest", "5$ and 6$", "$x_^$"]
    values, points = {"$x^$": np.ones(3)}, (np.ones((3, 2)), np.arange(3))
    figures = [
        plots.plot_class_histogram(COUNTS, names),
        plots.plot_transfer(values, {}, values, COUNTS, names, [1, 1, 1]),
        plots.plot_confusion({"$x^$": np.eye(3)}, COUNTS, names),
        plots.plot_tsne({"$x^$": points}, COUNTS, names),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "x.svg")
    assert [text.strip() for text in legend(figures[-1])] == ["5$ and 6$ (200)", "_rest (30)", "$x_^$ (5)"]
