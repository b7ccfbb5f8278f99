"""The recipe's section `hub`."""

from dataclasses import dataclass

from ecl_hf.checks import check_values, require


@dataclass(kw_only=True)
class HubConfig:
    """Uploading the model, at the end and while it is trained."""

    push: bool = False
    """Upload the model and its card after the last epoch."""
    repo_id: str | None = None
    """Hub repository, as in me/name; made if it is not there."""
    private: bool = False
    """Make a new repository private."""
    every: int | None = None
    """Also upload after every so many epochs, without stopping the training."""
    license: str | None = None
    """Hub identifier of the model's licence for the card, such as mit."""

    def __post_init__(self) -> None:
        check_values(self, "hub.")
        require(self.repo_id is not None or not self.push, "hub.push needs hub.repo_id")
        require(self.push or self.every is None, "hub.every needs hub.push")
        require(self.every is None or self.every >= 1, f"hub.every must be at least 1, got {self.every}")
