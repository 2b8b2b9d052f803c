"""One-step gradient with deep supervision: loop segments, each trained through its last step only (HRM, TRM).

    state_s = step(...step(detach(state_{s-1}))), all but the last step without gradient
    loss    = mean over s of [ cross-entropy(read(state_s)) + w * BCE(halt(state_s), "its answer is right") ]

Wang et al. 2025 (HRM, arXiv 2506.21734), Jolicoeur-Martineau 2025 (TRM, arXiv 2510.04871). Both update the weights
after every segment. Here an optimiser step is a function of (seed, step), so the segments of a batch share one update:
each starts from a state computed with the same weights.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from looped.config import Config
from looped.config.recurrence import RecurrenceConfig, SupervisionConfig
from looped.data.batch import Batch
from looped.models.language import LanguageModel
from looped.nn.projection import head_logits
from looped.objectives.base import Loss, Objective, head_losses
from looped.objectives.bptt import Unrolled
from looped.rng import StepRandom
from looped.tensor_types import Bool, Float, Int


class OneStep(Unrolled):
    """Segments of `steps` loop steps without gradient and one with it; a halting head is trained alongside.

    metrics: `halt_accuracy`, the fraction of readouts that the head judges correctly, and `right`, the fraction of
    correct answers after the last segment. `recurrence.mean` and the truncation settings are not used.
    """

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.recurrence, config.supervision)

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        """(smallest, largest) trained depth: the state is decoded after each segment."""
        return config.supervision.steps + 1, config.main_depth

    def __init__(self, model: LanguageModel, config: RecurrenceConfig, supervision: SupervisionConfig):
        super().__init__(model, config)
        self.supervision = supervision
        self.halt: nn.Linear = nn.Linear(model.width, 1)
        nn.init.zeros_(self.halt.weight)  # as in HRM: starts at log-odds 0
        nn.init.zeros_(self.halt.bias)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        start = self.start(tokens, random)
        batch, state = start.batch, self.model.initial_state(start.e, start.noise)
        losses, halts, judged = [], [], []
        without = self.supervision.steps
        for segment in range(self.supervision.segments):
            state = self.model.unroll(start.e, start.rows, no_grad=without, grad=1, state=state.detach(),
                                      disturb=start.disturb, first=segment * (without + 1))
            hidden = self.model.hidden(state, start.rows)
            logit = self.halt_logit(self.model.recurrence.leave(state), batch)
            right = self.is_right(hidden.detach(), batch)
            losses.append(batch.mean(head_losses(self.model, hidden, batch.targets)).mean())
            halts.append(binary_cross_entropy_with_logits(logit, right.to(logit.dtype)))
            judged.append((logit.detach() > 0) == right)
        cross_entropy, halt = torch.stack(losses).mean(), torch.stack(halts).mean()
        value = cross_entropy + self.supervision.halt_weight * halt
        metrics = {"loss": value.detach(), "cross_entropy": cross_entropy.detach(), "halt_loss": halt.detach(),
                   "halt_accuracy": torch.stack(judged).float().mean(), "right": right.float().mean()}
        return Loss(value, metrics)

    def halt_logit(self, state: Float[Tensor, "batch length width"], batch: Batch) -> Float[Tensor, "batch"]:
        """Log-odds that the answer decoded from a state is correct: a linear map of the normalised state averaged over
        the rows to predict; in float32 or wider."""
        state = self.model.norm(state)
        state = state.to(torch.promote_types(state.dtype, torch.float32))
        if batch.scored is None:
            mean = state.mean(1)
        else:
            mean = (state * batch.scored.unsqueeze(-1)).sum(1) / batch.scored.sum(1, keepdim=True).clamp(min=1)
        with torch.autocast(state.device.type, enabled=False):
            return self.halt(mean).squeeze(-1)

    @torch.no_grad()
    def is_right(self, hidden: Float[Tensor, "batch length width"], batch: Batch) -> Bool[Tensor, "batch"]:
        """True for each sequence whose rows to predict are all decoded correctly."""
        same = head_logits(self.model, hidden).argmax(-1) == batch.targets
        return (same if batch.scored is None else same | ~batch.scored).all(1)

    def expected_depths(self) -> tuple[float, float]:
        """Steps of all segments together: (without gradient, with gradient)."""
        return float(self.supervision.segments * self.supervision.steps), float(self.supervision.segments)

    def layer_forwards(self) -> float:
        return self.cost(*self.expected_depths(), readings=self.supervision.segments)
