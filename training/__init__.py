"""The scripts, installed as `ecl_hf.training`, and training from Python.

    from ecl_hf.runs.recipe import Recipe
    from ecl_hf.training import train

    run = train(Recipe.named("quickstart", epochs=5), "runs/quickstart")
    run.results["test"]["plain"]["ensemble"]["top1"]
    model = run.model()

Each file beside this one is a script of its own, which imports none of the others: `python training/train.py ...` in a
checkout, `ecl-hf train ...` anywhere. Recipes and launch configurations lie beside them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ecl_hf.modeling_ecl import ECLForImageClassification
from ecl_hf.runs.folder import RunFolder, read_results
from ecl_hf.runs.interruption import STOPPED
from ecl_hf.runs.recipe import Recipe
from ecl_hf.terminal import speaking
from ecl_hf.training import train as script

__all__ = ["Run", "train"]


class Run:
    """A finished run.

    Args:
        path: of its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = RunFolder(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def results(self) -> dict[str, Any]:
        """Content of `results.json`: test scores, class counts, recipe, versions, machine."""
        return read_results(self.folder.results_file, {})

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`: each epoch's loss terms, learning rate and speed; up to one that is damaged."""
        return self.folder.read_log()[0]

    def model(self, experts: Sequence[int] | None = None) -> ECLForImageClassification:
        """The trained model; with `experts`, those alone are read."""
        return ECLForImageClassification.from_pretrained(self.folder.model, experts=experts)

    def report(self) -> Path:
        """Draw the figures, evaluating the model first if that was not done, and return the path of the page.

        Raises:
            ImportError: it needs `pip install 'ecl-hf[figures]'`.
            RuntimeError: the run is not finished, or a file of it is damaged; the message names it.
        """
        from ecl_hf.training.figures import main

        with _raising():
            return main([f"--run={self.path}"])


@contextmanager
def _raising() -> Iterator[None]:
    """Raise the sentence with which a script ends as a RuntimeError."""
    try:
        yield
    except SystemExit as end:
        raise RuntimeError(str(end.code).strip().removeprefix("error: ")) from end.__context__


def train(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    report_to: Sequence[str] = (),
) -> Run:
    """Train in this process, as `ecl-hf train` does.

    Args:
        recipe: what to train; `Recipe.named` reads one and changes it.
        output_dir: run folder to write.
        resume: continue the run in `output_dir`, if there is one.
        allow_changes: continue it although the recipe has changed.
        report_to: trackers, such as `tensorboard`.

    Raises:
        RuntimeError: the run can't begin or go on; the message is the sentence that the script says.
        KeyboardInterrupt: it was interrupted, and continues with `resume`.
    """
    given = {"output_dir": Path(output_dir), "resume": resume, "allow_changes": allow_changes}
    with _raising(), speaking():
        try:
            return Run(script.run_recipe(recipe, Namespace(**given, report_to=list(report_to), left_out=[])))
        except SystemExit as end:
            if end.code == STOPPED:
                raise KeyboardInterrupt(f"{output_dir} goes on from its checkpoint with resume=True") from None
            raise
