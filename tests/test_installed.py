"""The wheel, installed where there is no checkout: trains, exports and predicts from any folder."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCES = ("ecl_hf", "training", "hub_cards", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", source / "dist", source], check=True)
    [file] = (source / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with this wheel; everything else it sees is the running one's, without its editable installs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    # pip would find an ecl_hf good enough that it sees in the running environment, or where other tests look for it.
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True, env={**os.environ, "PYTHONPATH": ""})
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(where) / "running.pth").write_text("\n".join(seen))
    return python


def test_every_file_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "ecl_hf").rglob("*.py")} | {"ecl_hf/py.typed"}
    for folder in ("training", "hub_cards"):
        paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "results" not in path.parts]
        wanted |= {f"ecl_hf/{path.relative_to(ROOT)}" for path in paths if path.suffix != ".pyc"}
    wanted -= {name for name in wanted if Path(name).name in ("README.md", "example_cifar10_lt_small.md")}
    assert wanted <= inside
    assert not {name for name in inside if {"results", "tests"} & set(Path(name).parts)}


def test_train_on_two_processes_export_and_predict_from_another_folder(python, tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [python.with_name("ecl-hf"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--method=bc", "--train.max_steps=2", "--model.image_size=8"]
    said = run("train", "--cpu", "--num_processes=2", "--recipe=quickstart", *small, "--output_dir=run")
    assert "2 process(es) on cpu" in said
    run("export", "--run", "run", "--output", "published", "--repo_id", "me/digits")
    assert "me/digits" in (tmp_path / "published/README.md").read_text()
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    assert "black.png" in run("predict", "--model", "published", "black.png")
