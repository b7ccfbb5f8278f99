"""The image-classification pipeline with what only an ensemble can answer."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

from transformers import ImageClassificationPipeline


class ECLImageClassificationPipeline(ImageClassificationPipeline):
    """`pipeline("image-classification", model=..., pipeline_class=ECLImageClassificationPipeline)`.

    Takes these arguments beside those of transformers' pipeline, when it is made or when it is called:

    - `flip`: average the logits of a picture and its mirror image.
    - `target_prior`: class frequencies of the pictures, as a sequence in label order or a dictionary by class name
      (what it leaves out has frequency 0); see `ECLForImageClassification.forward`.
    - `disagreement`: add the experts' disagreement in nats to each answer, the same number for all classes of a
      picture (`modeling_ecl.expert_disagreement`).
    """

    def _sanitize_parameters(
        self,
        flip: bool | None = None,
        target_prior: Sequence[float] | Mapping[str, float] | None = None,
        disagreement: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if flip is not None:
            forward["flip"] = flip
        if target_prior is not None:
            forward["target_prior"] = self._prior(target_prior)
        if disagreement is not None:
            postprocess["disagreement"] = disagreement
        return preprocess, forward, postprocess

    def _prior(self, target_prior: Sequence[float] | Mapping[str, float]) -> list[float]:
        if not isinstance(target_prior, Mapping):
            return list(target_prior)
        names = [self.model.config.id2label[c] for c in range(self.model.config.num_labels)]
        if twice := sorted(name for name in target_prior if names.count(name) > 1):
            raise ValueError(f"target_prior names {twice[0]!r}, as several classes are called; give a sequence instead")
        if unknown := sorted(set(target_prior) - set(names)):
            raise ValueError(f"target_prior names classes that the model does not know: {', '.join(unknown[:10])}")
        for name, value in target_prior.items():
            if not isinstance(value, SupportsFloat):
                raise ValueError(f"target_prior[{name!r}] must be a number, not {value!r}")
        return [float(target_prior.get(name, 0.0)) for name in names]

    def _forward(self, model_inputs: dict[str, Any], **kwargs: Any) -> Any:
        return self.model(**model_inputs, **kwargs)

    def postprocess(self, model_outputs: Any, disagreement: bool = False, **kwargs: Any) -> list[dict[str, Any]]:
        """Classes with their probabilities, best first, as `{"label", "score"}` and, on request, `"disagreement"`."""
        answers = super().postprocess(model_outputs, **kwargs)
        if disagreement:
            answers = [{**answer, "disagreement": model_outputs.disagreement[0].item()} for answer in answers]
        return answers
