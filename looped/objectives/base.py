"""The interface of every training rule: a module that turns tokens into a loss and reports its cost."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from looped.config import Config
from looped.data.batch import Batch
from looped.devices import read_together
from looped.errors import UserError
from looped.models.language import LanguageModel
from looped.nn.checks import require
from looped.nn.fused import linear_cross_entropy
from looped.nn.masks import Full, Near, Packed, Padded
from looped.nn.projection import has_plain_head, head_logits
from looped.nn.rows import PLAIN, Rows
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


@dataclass
class Loss:
    """`value`: mean nats/token, the tensor to differentiate. `metrics`: detached figures for the log.

    `shares`: metrics over some of the rows, each a pair (sum, number of rows); what no row of a batch belongs to is not
    logged. The trainer reads all figures of a step at once, at its end.
    """

    value: Tensor
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    shares: dict[str, Float[Tensor, "2"]] = field(default_factory=dict)


def figures_of(losses: Sequence[Loss]) -> list[dict[str, float]]:
    """`metrics` and the means of `shares` of several losses as numbers, all in one read of the device."""
    read = iter(read_together([value for loss in losses for value in (
        *loss.metrics.values(), *(part for share in loss.shares.values() for part in share))]))
    figures = []
    for loss in losses:
        numbers = {name: next(read) for name in loss.metrics}
        sums = {name: (next(read), next(read)) for name in loss.shares}
        figures.append(numbers | {name: total / number for name, (total, number) in sums.items() if number})
    return figures


DEFINE = "define its method {} (docs/extending.md)"


class Objective(nn.Module):
    """A training rule over `encode`, `step`, `decode`; holds the model and any further parameters of the rule.

    end_of_text: the token that ends a document, or None. separate: True if documents in one sequence do not attend to
    each other (`data.documents`). learned: the data that it was built for, as a noun; "" for text. setting:
    the value of `objective` that it was built from; "" if built directly.
    """

    model: Any
    """A `LanguageModel`, an `ImageDenoiser`, or a custom model."""
    rollout: Any
    """The way to run a trained model at a depth: a key of `looped.inference.rollout.ROLLOUTS`, or a custom class."""
    end_of_text: int | None = None
    separate: bool = False
    learned: str = ""
    setting: str = ""

    @property
    def changes(self) -> str:
        """The difference between steps, so that one graph cannot hold them all, as a clause; "" if nothing does."""
        return ""

    one_process: str = ""
    """A clause with the reason why only one process may train by this rule; "" if several may."""

    damping: float = 0.0
    """The fraction of the state that a loop step keeps in evaluation."""

    @property
    def backprop(self) -> int | None:
        """The number of final loop steps that gradients go through; None: all steps."""
        return None

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> "Objective":
        """The rule of a config, around `model`."""
        raise UserError(f"{cls.__name__} does not say how it is built from a config; {DEFINE.format('from_config')}")

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        """(smallest, largest) depth that training with a config runs."""
        return config.main_depth, config.main_depth

    def ask(self, tokens: Int[Tensor, "batch length_and_one"] | Batch) -> Batch:
        """The batch of this rule for plain tokens: predict each token from those before it, in its own document if
        `separate`. A batch is returned unchanged."""
        if self.separate and isinstance(tokens, Tensor):
            if self.end_of_text is None:
                raise UserError("documents are split at their end-of-text token; set objective.end_of_text")
            return Batch.of_documents(tokens, self.end_of_text)
        return Batch.of(tokens)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        """The loss of predicting tokens[:, 1:] from tokens[:, :-1], or the targets of a batch from its inputs."""
        raise UserError(f"{type(self).__name__} has no loss; {DEFINE.format('forward')}")

    def before_training(self, train: Any) -> str:
        """Take notice of the training data (`Data.train`); returns a line for the log, "" for none. The trainer calls
        it once, before a checkpoint is read."""
        return ""

    def before_step(self, spent: float) -> None:
        """Take notice of the fraction of the budget that is spent; the trainer calls it before each optimiser step."""

    def after_step(self) -> None:
        """Update what the rule learns without gradient; every process calls it once after each optimiser step."""

    def to_carry(self) -> dict[str, Tensor]:
        """Tensors, besides weights, that the rule carries from one optimiser step to the next, for a checkpoint."""
        return {}

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        """Take up the tensors of `to_carry` from a checkpoint."""

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        """The kinds of training step that differ in cost: (weight in the mean step, decisions by name).

        The names are those of `StepRandom.decide`. A fractional mean depth is a weighted sum of whole depths, as the
        cost of a step is linear in its depths. Weights add up to 1 and may be negative.
        """
        return [(1.0, {})]

    def without_values(self) -> None:
        """Prepare for tensors without values, on which costs are counted: loops with a data-dependent stop run to
        their limit."""

    def layer_forwards(self) -> float:
        """Expected cost of one training sequence in forward passes of one layer; a backward pass counts two."""
        raise UserError(f"{type(self).__name__} does not say what it costs; {DEFINE.format('layer_forwards')}")


def require_objective(objective: Any) -> None:
    """Raise UserError if `objective` is not a training rule but, for example, a model or a run."""
    require(objective, Objective, "objective",
            "pass run.objective of looped.load_run(path), or build_objective(config, model)")


def require_text(objective: Any, of: str) -> None:
    """Raise UserError for what is no training rule over text; `of`: what only text has."""
    require_objective(objective)
    if objective.learned or not hasattr(objective.model, "vocab_size"):
        over = objective.learned or f"a {type(objective.model).__name__}"
        raise UserError(f"{of} need an objective over text, and this one is over {over}; measure its run with looped "
                        f"eval RUN")


@contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Context in which the objective is in evaluation mode; its previous mode is restored, after an error too."""
    was_training = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)


class Classifier(Objective):
    """A training rule that classifies images by its own procedure, neither a loop nor a denoiser's solver."""

    rollout = "own"

    def class_logits(self, batch: Batch, depth: int, random: StepRandom, *,
                     stream: str = "") -> Float[Tensor, "batch classes"]:
        """Logits of the classes after `depth` steps; another `stream` gives other random draws for the same images."""
        raise NotImplementedError

    def class_cost(self, depth: int) -> tuple[int, tuple[float, ...], int]:
        """Cost of `class_logits`: (layers before the first step, layers of each step, network evaluations per step)."""
        raise NotImplementedError


EVERYBODY = Full()


def rows_of_batch(batch: Batch) -> Rows:
    """The attention mask and the positions of a batch, as model calls need them."""
    if batch.documents is not None:
        return Rows(mask=Packed(batch.documents, causal=batch.causal), positions=batch.positions)
    if batch.causal:  # padding follows the sequence, so the causal mask hides it
        return PLAIN
    if batch.window is not None:
        mask = Near(batch.positions[:1] if batch.lengths is None else batch.positions, batch.window, batch.lengths)
    else:
        mask = EVERYBODY if batch.lengths is None else Padded(batch.lengths, causal=False)
    return Rows(mask=mask, positions=batch.positions)


def token_losses(logits: Float[Tensor, "batch length vocab"],
                 tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
    """Cross-entropy in nats of every token, in float32; for evaluation."""
    return cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def head_losses(model: LanguageModel, hidden: Float[Tensor, "batch length width"], tokens: Int[Tensor, "batch length"],
                *, scale: Float[Tensor, ""] | None = None,
                evidence: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "batch length"]:
    """`token_losses(scale * model's logits + evidence, tokens)` from `model.hidden`; with a plain head no logits
    are kept for backward."""
    if has_plain_head(model):
        return linear_cross_entropy(hidden, model.head_weight, tokens, scale=scale, evidence=evidence)
    logits = head_logits(model, hidden).float()
    logits = logits if scale is None else logits * scale
    return token_losses(logits if evidence is None else logits + evidence[0].float() @ evidence[1].float().T, tokens)
