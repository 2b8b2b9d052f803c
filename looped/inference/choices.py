"""The choice among several trajectories of each problem, for every rule: the mechanism behind `evaluation.choose`.

    mean         argmax of the mean readout
    vote         the answer that most trajectories give (PTRM's mode, Sghaier et al. 2026, arXiv 2605.19943)
    cell-vote    in each cell the symbol that most trajectories give
    confidence   the trajectory with the highest mean log-probability of its own answer
    residual     the trajectory whose latent moved least in its last three steps (EqR, Huang et al. 2026, arXiv
                 2605.21488, whose code measures it by the logits: evaluators/eval_fn.py of locuslab/EqR at 4d45856)
    head         the trajectory with the highest logit of the halting head (PTRM's best-Q)
    consistent   the trajectory whose answer a denoiser is most confident of on reading it again

Means are over the predicted cells. Ties go to the first trajectory. A custom choice is a subclass of `Choice`, named by
the dotted path of the class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from looped.config.choices import NEEDS
from looped.data.batch import Batch
from looped.devices import widest
from looped.errors import UserError, did_you_mean
from looped.import_path import class_at
from looped.inference.cost import NUM_CHECKS
from looped.tensor_types import Float, Int

Renoised = Callable[[Int[Tensor, "batch length"], int], Float[Tensor, "batch"]]
"""(answers, number of the trajectory) -> a denoiser's confidence in them on reading them again."""


@dataclass(frozen=True)
class Runs:
    """The trajectories of a batch, at their end. logits: readouts. used: steps of each problem. residual: change of the
    latent relative to its norm (`Motion`), halt: logits of the halting head, both None if there is none. renoised: a
    denoiser's judgement, None if there is none."""

    batch: Batch
    logits: Float[Tensor, "runs batch length symbols"]
    used: Int[Tensor, "runs batch"]
    residual: Float[Tensor, "runs batch"] | None = None
    halt: Float[Tensor, "runs batch"] | None = None
    renoised: Renoised | None = None

    @property
    def answers(self) -> Int[Tensor, "runs batch length"]:
        """The answer of each trajectory: the most likely symbol of each cell."""
        return self.logits.argmax(-1)

    @staticmethod
    def joined(parts: "list[Runs]") -> "Runs":
        """The trajectories of several parts, which have the same batch and the same figures."""
        first, together = parts[0], {}
        for name in ("logits", "used", "residual", "halt"):
            values = [getattr(part, name) for part in parts]
            together[name] = None if values[0] is None else torch.cat(values)
        return Runs(first.batch, **together, renoised=first.renoised)


class Choice:
    """A choice among trajectories."""

    name: str = ""
    num_checks: ClassVar[int] = 0
    """Network evaluations that it adds to each trajectory."""

    def answer(self, runs: Runs) -> Int[Tensor, "batch length"]:
        """The chosen answer of each problem. Raises UserError if the runs lack what the choice needs."""
        raise NotImplementedError


class Mean(Choice):
    """The most likely symbols under the mean readout."""

    def answer(self, runs: Runs) -> Int[Tensor, "batch length"]:
        return runs.logits.softmax(-1).mean(0).argmax(-1)


class CellVote(Choice):
    """The most frequent symbol of each cell; of equally frequent ones the most likely under the mean readout."""

    def answer(self, runs: Runs) -> Int[Tensor, "batch length"]:
        votes = one_hot(runs.answers, runs.logits.shape[-1]).sum(0)
        mean = runs.logits.softmax(-1).mean(0).to(widest(runs.logits.device))
        return (votes + 0.5 * mean).argmax(-1)  # a readout is at most 1, which one vote outweighs


class Best(Choice):
    """Base of choices that take the answer of the trajectory with the highest `score`."""

    def answer(self, runs: Runs) -> Int[Tensor, "batch length"]:
        best = self.score(runs).argmax(0)
        return runs.answers[best, torch.arange(len(best), device=best.device)]

    def score(self, runs: Runs) -> Float[Tensor, "runs batch"]:
        """The score of each trajectory of each problem."""
        raise NotImplementedError

    def needed(self, value: Any) -> Any:
        """A figure of the runs. Raises UserError if it is None."""
        if value is None:
            raise UserError(f"evaluation.choose {self.name} needs {NEEDS[self.name]}, and this run has none; set it to "
                            f"mean, vote or confidence")
        return value


class Vote(Best):
    """The number of trajectories with the same answer."""

    def score(self, runs: Runs) -> Float[Tensor, "runs batch"]:
        answers, sought = runs.answers, runs.batch.sought
        same = [((answers == own) | ~sought).all(-1).sum(0) for own in answers]
        return torch.stack(same).float()


class Confidence(Best):
    """The mean log-probability of the trajectory's own answer."""

    def score(self, runs: Runs) -> Float[Tensor, "runs batch"]:
        return torch.stack([runs.batch.mean(each.log_softmax(-1).amax(-1)) for each in runs.logits])


class Residual(Best):
    """Minus the change of the latent in the last steps relative to its norm."""

    def score(self, runs: Runs) -> Float[Tensor, "runs batch"]:
        return -self.needed(runs.residual)


class Head(Best):
    """The logit of the halting head."""

    def score(self, runs: Runs) -> Float[Tensor, "runs batch"]:
        return self.needed(runs.halt)


class Consistent(Best):
    """The denoiser's confidence in the answer on reading it again."""

    num_checks: ClassVar[int] = NUM_CHECKS

    def score(self, runs: Runs) -> Float[Tensor, "runs batch"]:
        judge = self.needed(runs.renoised)
        return torch.stack([judge(own, number) for number, own in enumerate(runs.answers)])


CLASSES: dict[str, type[Choice]] = {"mean": Mean, "vote": Vote, "cell-vote": CellVote, "confidence": Confidence,
                                    "residual": Residual, "head": Head, "consistent": Consistent}


def choice_of(name: str) -> Choice:
    """The choice of a name of `looped.config.choices.CHOICES`, or of the dotted path of a custom class. Raises
    UserError."""
    if name not in CLASSES and "." not in name:
        raise UserError(f"evaluation.choose '{name}' is unknown{did_you_mean(name, CLASSES)}")
    made: Any = CLASSES[name] if name in CLASSES else class_at(name, "evaluation.choose")
    if not (isinstance(made, type) and issubclass(made, Choice)):
        raise UserError(f"evaluation.choose {name} is no choice; give the dotted path of a subclass of "
                        f"looped.inference.choices.Choice")
    choice = made()
    choice.name = name
    return choice
