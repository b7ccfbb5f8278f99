"""The report of figures.py: complete, self-contained, and in order in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import figures
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from ecl_hf.evidence.plots import fonts
from tests.made_up_runs import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FIGURES = {name for name in figures.TEXTS if name not in ("fig4_experts", "fig5_weights")}

# Loads the report in a frame as wide as a screen and writes down what a reader would notice.
LOOK = """<!DOCTYPE html><body><iframe id="page" src="{report}" width="{width}" height="800"></iframe>
<pre id="seen"></pre>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const images = [...page.querySelectorAll(".picture img")]
    .map(image => image.complete && image.naturalWidth > 100 && image.alt.length > 20);
  const mistakes = [...page.querySelectorAll(".mistakes img")]
    .map(image => image.complete && image.naturalWidth > 0 && image.alt.length > 20 && image.width > 40);
  page.querySelectorAll("details").forEach(details => {{ details.open = true; }});
  const small = [...page.querySelectorAll("p, td, th, figcaption, li")]
    .map(element => parseFloat(getComputedStyle(element).fontSize)).filter(size => size < 12);
  const seen = {{ overflow: root.scrollWidth - root.clientWidth, images, mistakes, small: small.length,
    width: root.clientWidth,
    scripts: page.scripts.length, tables: page.querySelectorAll(".scroll > table").length }};
  document.getElementById("seen").textContent = JSON.stringify(seen);
}});
</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "ours"), make_run(folder / "theirs", seed=1)]
    results = folder / "results"
    results.mkdir()
    wide = {name: f"{i}.0 ± 1.0" for i, name in enumerate(["top1", "ece", *(f"column {i}" for i in range(18))])}
    (results / "table3.csv").write_text(",".join(wide) + "\n" + ",".join(wide.values()) + "\n")
    argv = [
        f"--run={runs[0]}",
        f"--run={runs[1]}",
        f"--results={results}",
        "--names",
        "ECL",
        "K independent <networks>",
    ]
    return figures.main([*argv, f"--output={folder / 'out'}"])


@pytest.fixture
def undrawn(monkeypatch):
    """Without the seconds that writing the figures takes, for tests of the text."""
    monkeypatch.setattr(figures, "save", lambda *_: "")


class Collect(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_every_figure_is_written_and_inlined(report):
    assert {path.stem for path in report.parent.glob("*.png")} == FIGURES
    assert {path.stem for path in report.parent.glob("*.svg")} == FIGURES
    parser = Collect()
    parser.feed(report.read_text())
    images = [attributes for tag, attributes in parser.tags if tag == "img"]
    inlined = {base64.b64decode(image["src"].partition(",")[2]) for image in images}
    inlined -= {
        base64.b64decode(entry["src"].partition(",")[2])
        for name in ("ours", "theirs")
        for kind in ("worst", "confused")
        for shown in json.loads((report.parents[1] / name / "evaluation.json").read_text())[kind]
        for entry in shown["pictures"]
    }
    assert inlined == {path.read_bytes() for path in report.parent.glob("*.png")}
    anchors = {attributes.get("id") for _, attributes in parser.tags}
    assert {attributes["href"][1:] for tag, attributes in parser.tags if tag == "a"} <= anchors


def test_report_needs_nothing_from_elsewhere_and_escapes_names(report):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", report.read_text())
    assert not re.search(r"https?://|<script|<link (?!rel=\"icon\" href=\"data:)|@import|url\(", text)
    assert "K independent &lt;networks&gt;" in text
    assert "<networks>" not in text


def test_report_says_what_is_not_drawn(report):
    text = report.read_text()
    assert "there is no fig4.csv with a measured row" in text
    assert "there is no fig5.csv with a measured row" in text


def test_scores_of_the_report_are_those_of_the_evaluation(report):
    test = json.loads((report.parents[1] / "ours" / "evaluation.json").read_text())["test"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", report.read_text())
    first = cells.index("ensemble") - 1
    ensemble = test["plain"]["ensemble"]
    expected = [f"{100 * ensemble[key]:.1f}" for key in figures.SCORES]
    assert cells[first : first + 3 + len(figures.SCORES)] == ["ECL", "ensemble", "no", *expected]
    best = max(expert["top1"] for expert in test["flip"]["experts"])
    row = cells.index("best expert", cells.index("yes"))
    assert cells[row + 2] == f"{100 * best:.1f}"


def test_scores_have_names_for_readers(report):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", report.read_text())
    titles = re.findall(r"<th [^>]*>([^<]*)</th>", text.partition("What was run")[0])
    assert titles[3:] == ["balanced", "top-1", "macro F1", "top-5", "many", "medium", "few", "calibration error"]
    assert not re.search(r"macro_f1|\btop1\b|\btop5\b|\bece\b", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: .ci/run installs Debian's, where it may")
@pytest.mark.parametrize("width", [375, 1200])
def test_report_in_a_browser(report, tmp_path, width):
    page = tmp_path / "look.html"
    page.write_text(LOOK.format(report=report.as_uri(), width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout).group(1))
    assert abs(seen["width"] - width) <= 20  # a scroll bar
    assert seen["overflow"] <= 0
    assert seen["images"] == [True] * len(FIGURES)
    assert seen["small"] == 0
    assert seen["tables"] == 5
    assert set(seen["mistakes"]) == {True}
    assert seen["scripts"] == 0


def test_a_single_model_without_run_folder(tmp_path, undrawn):
    run = make_run(tmp_path / "run", landscape=False)
    for name in ("results.json", "metrics.jsonl"):
        (run / name).unlink()
    report = figures.main([f"--run={run / 'evaluation.json'}"])
    assert report == run / "figures" / "report.html"
    text = report.read_text()
    assert "there is no metrics.jsonl beside the evaluation" in text
    assert "--landscape_images 1000" in text
    assert "unknown" in text


def test_theory_has_an_optimal_tau_for_two_priors_alone(tmp_path, monkeypatch):
    drawn = {}
    names = [name for name in vars(figures.plots) if name.startswith("plot_")]
    plots = {name: staticmethod(lambda data, *_, name=name: drawn.update({name: data})) for name in names}
    monkeypatch.setattr(figures, "plots", type("Plots", (), plots))
    evidence = figures.read_evidence(make_run(tmp_path / "run", landscape=False), None, 0)
    priors = {"bc": "uniform", "ce": "train", "sade": [0.1] * 10}
    runs = {
        name: replace(evidence, evaluation=evidence.evaluation | {"logit_prior": prior}, arrays={})
        for name, prior in priors.items()
    }
    figures.draw_all(runs, {}, list("abcdefghij"))
    assert {name: theory for name, (_, theory) in drawn["plot_posthoc"].items()} == {"bc": 0, "ce": 1, "sade": None}


def packed(shape, size):
    """An .npz file with an array of so many zeros, and as many bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as part:
        part.write(header.getvalue())
        part.write(bytes(size))
    return bytearray(file.getvalue())


def test_arrays_that_are_none_are_named(tmp_path, monkeypatch):
    file = tmp_path / "evaluation.npz"
    file.write_bytes(packed((9,), 9))
    assert figures.read_arrays(file)["x"].tolist() == [0] * 9
    flipped = packed((9,), 9)
    flipped[40] ^= 255
    monkeypatch.setattr(figures, "MAX_ARRAYS", 1000)
    cases = ((flipped, ""), (packed((10**14,), 9), ""), (packed((999,), 999), "its arrays have more than 1000 bytes"))
    for content, said in (*cases, (b"", ""), (b"PK\3\4", "")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"evaluation\.npz is damaged \({said}.*evaluate\.py has to run again"):
            figures.read_arrays(file)


FIG4 = "experts,model,top1,top1_std,few,few_std\n3,ensemble,40.1,0.3,,\n2,ensemble,,,,\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("table1", None, "is no regular file"),
        ("table1", b"caf\xe9", "is no text file in UTF-8"),
        ("table1", b"a" * 2_000_000, "has 2000000 bytes"),
        ("table1", b"a,b\n" * 1000, "has 999 rows"),
        ("table1", b'a\n"' + b"x" * 200_000, "is no CSV file"),
        ("table1", b"a,b\n1\n", "row 1 has not as many cells"),
        ("table1", b"a,b\n1,2,3\n", "row 1 has not as many cells"),
        ("fig4", FIG4.replace("top1,", "top2,").encode(), "lacks the column top1"),
        ("fig4", FIG4.replace("40.1", "nan").encode(), "row 1 can't have top1 'nan'"),
        ("fig4", FIG4.replace("ensemble", "\x01").encode(), r"row 1 can't have model '\\x01'"),
        ("fig5", b"swept,value,model,top1,top1_std,few,few_std\nx,1,ensemble,,,,\n", "row 1 can't have swept 'x'"),
    ],
)
def test_tables_that_are_none_are_named(name, content, said, tmp_path):
    if content is None:
        os.mkfifo(tmp_path / f"{name}.csv")
    else:
        (tmp_path / f"{name}.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}\.csv:? {said}"):
        figures.read_tables(tmp_path)


def test_tables_with_numbers_are_drawn(tmp_path):
    (tmp_path / "fig4.csv").write_text(FIG4)
    tables = figures.read_tables(tmp_path)
    assert figures.points(tables["fig4"]) == [
        {"experts": 3.0, "model": "ensemble", "top1": 40.1, "top1_std": 0.3, "few": None, "few_std": None}
    ]


def test_figures_take_the_place_of_links(tmp_path):
    """Those of a stranger's run folder could lead to any file."""
    (tmp_path / "precious").write_text("years of work")
    for name in ("x.svg", "x.png", ".x.svg.partial", ".x.png.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    png = figures.save("x", Figure((1, 1)), tmp_path)
    assert (tmp_path / "precious").read_text() == "years of work"
    assert base64.b64decode(png) == (tmp_path / "x.png").read_bytes()
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_runs_on_other_data_are_refused_before_one_is_evaluated(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    results = json.loads((runs[1] / "results.json").read_text())
    (runs[1] / "results.json").write_text(json.dumps(results | {"class_names": list("klmnopqrst")}))
    for run in runs:
        (run / "evaluation.json").unlink()
    monkeypatch.setattr(figures.subprocess, "run", None)
    with pytest.raises(SystemExit, match="a and b can't be compared: they differ in class_names"):
        figures.main([f"--run={run}" for run in runs])


def test_runs_on_other_data_are_not_compared(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation | {"class_counts": [1] * 10}))
    with pytest.raises(SystemExit, match="a and b can't be compared: they differ in class_counts"):
        figures.main([f"--run={run}" for run in runs])
    assert not (runs[0] / "figures").exists()


def test_files_that_are_none_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("evaluation.npz", "evaluation.json", "results.json"):
        for text in ("[]", "", '{"test": {"plain": 7}}', "\0\xff"):
            (run / name).write_text(text, encoding="latin1")
            with pytest.raises(SystemExit, match=f"^error: {re.escape(str(run / name))} "):
                figures.main([f"--run={run}"])
    assert not (run / "figures").exists()


@pytest.mark.parametrize(
    "flags", [["--names", "x", "y"], ["--output={run}.html"], ["--run={run}"], ["--run=/nope"], ["--results=/nope"]]
)
def test_wrong_flags_are_named(tmp_path, flags, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as error:
        figures.main([f"--run={run}", *(flag.format(run=run) for flag in flags)])
    said = str(error.value) + capsys.readouterr().err
    assert any(part in said for part in ("2 names for 1 runs", "names a folder", "different names", "nope"))
    assert not (run / "figures").exists()


NAMES = [
    "Ärger im Ölfeld, eine sehr lange Bezeichnung einer Klasse, die niemals endet",
    *("浮游生物的一个非常长的中文类名称包含很多汉字", "クラゲの幼生", "해파리 유생", "العوالق الحيوانية", "פלנקטון"),
    *("<img src=x onerror=alert(1)>", "_hidden $x^2$ $y$ \x01\x1b[31m\u202e", "a" * 70 + "1", "a" * 70 + "2"),
]


@pytest.fixture
def strange(tmp_path):
    """A run whose class names are long, in scripts for which there may be no font, and no text of HTML."""
    run = make_run(tmp_path / "run", landscape=False)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["worst"][0]["pictures"][0]["src"] = 'x" onerror="alert(1)'
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"class_names": NAMES}))
    return run


def test_strange_names_are_readable_and_do_nothing(strange, monkeypatch, capsys):
    own = [font for font in font_manager.fontManager.ttflist if "DejaVu" in font.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)  # as where no other font is installed
    fonts.find_fonts.cache_clear()
    text = figures.main([f"--run={strange}"]).read_text()  # a warning would be an error
    fonts.find_fonts.cache_clear()
    parser = Collect()
    parser.feed(text)
    assert not any(key.startswith("on") for _, attributes in parser.tags for key in attributes)
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert all(f"<bdi>{name}</bdi>" in text for name in NAMES[1:6])
    assert text.count('<img class="tiny" src="data:image/png') + text.count('<img src="data:image/jpeg') > 5
    said = capsys.readouterr().out
    assert re.search(
        r"no font of this machine has \d+ characters of the names \(.*\): figures show numbers instead", said
    )
    drawn = (strange / "figures" / "fig6_tsne.svg").read_text()
    comments = re.findall(r"<!-- (.*?) -->", drawn)  # the texts, whose letters are drawn as paths
    assert {"class 1 (299)", "class 2 (179)", "class 3 (107)"} <= set(comments)
    assert "פלנקטון (38)" in comments or "38" in drawn
    assert len({comment for comment in comments if comment.startswith("aaa")}) == 2
    assert any("hidden" in comment for comment in comments)  # all but its control characters
    drawings = list((strange / "figures").glob("*.svg"))
    assert drawings
    for drawing in drawings:  # a browser shows nothing of one with a control character
        ElementTree.parse(drawing)
    assert not {"\x01", "\x1b", "\u202e"} & set(text)


def test_each_class_is_in_the_table_worst_first(strange, undrawn):
    text = figures.main([f"--run={strange}"]).read_text()
    rows = json.loads((strange / "evaluation.json").read_text())["classes"]
    table = text.partition('id="classes"')[2].partition("</table>")[0]
    accuracies = re.findall(r"(?s)<tr><td class=\"name\">.*?</tr>", table)
    cells = [re.findall(r'<td class="number">([^<]*)</td>', row) for row in accuracies]
    assert [float(row[3]) for row in cells] == sorted(float(row[3]) for row in cells)
    for place, training, tested, *scores in cells:
        row = rows[int(place)]
        assert [int(training), int(tested)] == [row["training_images"], row["test_images"]]
        names = ("accuracy", "f1", "accuracy_training_prior", "f1_training_prior")
        assert scores == [f"{100 * row[name]:.1f}" for name in names]


def test_an_older_evaluation_has_no_table_of_classes_and_no_features(strange, undrawn):
    evaluation = json.loads((strange / "evaluation.json").read_text())
    for name in ("classes", "worst", "confused"):
        evaluation.pop(name)
    (strange / "evaluation.json").write_text(json.dumps(evaluation))
    with np.load(strange / "evaluation.npz") as file:
        arrays = {name: values for name, values in file.items() if not name.startswith("sampled_")}
    np.savez(strange / "evaluation.npz", **arrays, tsne_points=np.zeros((80, 2)), tsne_labels=np.zeros(80))
    text = figures.main([f"--run={strange}"]).read_text()
    assert "Worst classes" not in text
    assert "Fig. 6: t-SNE of test features: evaluate.py --run has to run again" in text


def test_no_flip_where_mirroring_changes_the_class(tmp_path):
    run = make_run(tmp_path / "run")
    evidence = figures.read_evidence(run, None, 0)
    assert {row[2] for row in figures.score_rows({"run": evidence})[1:]} == {"no", "yes"}
    recipe = evidence.results["recipe"]
    left = {**evidence.results, "recipe": {**recipe, "data": {**recipe["data"], "horizontal_flip": False}}}
    assert {row[2] for row in figures.score_rows({"run": replace(evidence, results=left)})[1:]} == {"no"}
