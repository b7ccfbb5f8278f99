"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ecl_hf"

# What each module may import of the package. The first three are published with every model and import nothing else.
ALLOWED = {
    "configuration_ecl": set(),
    "backbones": set(),
    "modeling_ecl": {"configuration_ecl", "backbones"},
    "__init__": {"configuration_ecl", "modeling_ecl"},
    "longtail": {"modeling_ecl"},
    "losses": set(),
    "metrics": set(),
    "recipe": set(),
    "views": set(),
    "momentum": {"losses"},
    "methods": {"losses", "recipe"},
    "collaborative": {"losses", "methods", "modeling_ecl", "momentum", "recipe"},
    "folders": {"recipe"},
    "sources": {"folders", "longtail", "recipe"},
    "picture_lists": set(),
    "official": {"folders", "picture_lists", "recipe", "sources"},
    "splits": {"recipe", "sources"},
    "data": {"longtail", "official", "recipe", "sources", "splits", "streaming"},
    "streaming": {"loaders", "pictures", "recipe", "sources", "views"},
    "pictures": set(),
    "loaders": {"pictures", "views"},
    "initialise": {"backbones", "configuration_ecl", "methods", "modeling_ecl", "recipe"},
    "evaluation": {"metrics"},
    "analysis": {"losses", "metrics", "modeling_ecl"},
    "landscape": set(),
    "hub": {"configuration_ecl", "metrics", "modeling_ecl", "plots"},
    "pipeline": set(),
    "batchnorm": set(),
    "checkpoints": set(),
    "finite": {"checkpoints"},
    "interruption": set(),
    "launch": set(),
    "locks": set(),
    "memory": {"checkpoints", "modeling_ecl"},
    "runs": {"checkpoints", "interruption", "locks", "modeling_ecl", "recipe"},
    "tables": {"recipe", "runs"},
    "plots.style": {"analysis", "metrics"},
    "plots.classes": {"analysis", "metrics", "plots.style"},
    "plots.models": {"plots.style"},
    "plots.__init__": {"plots.classes", "plots.models"},
}
SCRIPTS = sorted(path.stem for path in (ROOT / "training").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of all imports of a file, relative ones with their package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "ecl_hf." + node.module if node.level else node.module
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def modules() -> set[str]:
    """Dotted names below the package."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}


def siblings(names: set[str]) -> set[str]:
    known = modules() | {"plots"}
    return {name[7:] for name in names if name.startswith("ecl_hf.") and name[7:] in known}


def test_every_module_is_listed():
    assert modules() == ALLOWED.keys()


@pytest.mark.parametrize("module", ALLOWED)
def test_dependency_direction(module):
    names = imports(PACKAGE / f"{module.replace('.', '/')}.py")
    assert siblings(names) <= ALLOWED[module]
    tops = {name.split(".")[0] for name in names}
    assert "accelerate" not in tops
    assert "matplotlib" not in tops or module.startswith("plots.")
    data_modules = {"data", "folders", "official", "sources", "splits", "loaders", "streaming"}
    assert "datasets" not in tops or module in data_modules


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_script(script):
    assert not {name.split(".")[0] for name in imports(ROOT / "training" / f"{script}.py")} & set(SCRIPTS)


def test_inference_loads_no_training_dependency():
    heavy = ["datasets", "accelerate", "matplotlib", "sklearn", "torchmetrics", "jsonargparse", "ecl_hf.learning.task"]
    code = (
        f"import sys, timm, transformers.modeling_utils; before = set(sys.modules); import ecl_hf; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
