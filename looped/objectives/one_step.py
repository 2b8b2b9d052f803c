"""One-step gradient with deep supervision: loop segments, each trained through its last step only (HRM, TRM).

    state_s = step(...step(detach(state_{s-1}))), all but the last step without gradient
    loss    = mean over s of [ cross-entropy(read(state_s)) + w * BCE(halt(state_s), "its answer is right") ]

Wang et al. 2025 (HRM, arXiv 2506.21734), Jolicoeur-Martineau 2025 (TRM, arXiv 2510.04871). Both update the weights
after every segment and carry the states to the next optimiser step (`SegmentUpdates`, `supervision.update` segment). By
default the segments of a batch share one update, each from a state computed with the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from looped.config import Config
from looped.config.recurrence import RecurrenceConfig, SupervisionConfig
from looped.data.batch import Batch
from looped.devices import to_device
from looped.models.language import LanguageModel
from looped.nn.projection import head_logits
from looped.nn.two_states import answer_of
from looped.objectives.base import Loss, Objective, head_losses
from looped.objectives.bptt import Start, Unrolled
from looped.objectives.carried_states import CarriedStates
from looped.rng import StepRandom
from looped.tensor_types import Bool, Float, Int


@dataclass(frozen=True)
class Segment:
    """A segment of a batch: the state at its end, the mean losses of answers and halting head, and for each sequence
    whether the head takes its answer for right, and whether it is."""

    state: Float[Tensor, "batch length states"]
    cross_entropy: Float[Tensor, ""]
    halt_loss: Float[Tensor, ""]
    halts: Bool[Tensor, "batch"]
    right: Bool[Tensor, "batch"]


class OneStep(Unrolled):
    """Segments of `steps` loop steps without gradient and one with it; a halting head is trained alongside.

    metrics: `halt_accuracy`, the fraction of readouts that the head judges correctly, and `right`, the fraction of
    correct answers after the last segment. `recurrence.mean` and the truncation settings are not used.
    """

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return UPDATES[config.supervision.update](model, config.recurrence, config.supervision)

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
        state = self.model.initial_state(start.e, start.noise)
        segments = []
        for number in range(self.supervision.segments):
            segments.append(self.segment(start, state, first=number * (self.supervision.steps + 1)))
            state = segments[-1].state
        return self.loss_of(segments)

    def segment(self, start: Start, state: Float[Tensor, "batch length ..."], *, first: int = 0) -> "Segment":
        """One segment from a state, with its readout. first: the number of loop steps that led to the state."""
        batch = start.batch
        state = self.model.unroll(start.e, start.rows, no_grad=self.supervision.steps, grad=1, state=state.detach(),
                                  disturb=start.disturb, first=first)
        hidden = self.model.hidden(state, start.rows)
        logit = self.halt_logit(self.model.recurrence.leave(state), batch)
        right = self.is_right(hidden.detach(), batch)
        return Segment(state, batch.mean(head_losses(self.model, hidden, batch.targets)).mean(),
                       binary_cross_entropy_with_logits(logit, right.to(logit.dtype)), logit.detach() > 0, right)

    def loss_of(self, segments: Sequence["Segment"]) -> Loss:
        """The mean loss of segments."""
        cross_entropy = torch.stack([segment.cross_entropy for segment in segments]).mean()
        halt = torch.stack([segment.halt_loss for segment in segments]).mean()
        value = cross_entropy + self.supervision.halt_weight * halt
        judged = torch.stack([segment.halts == segment.right for segment in segments])
        metrics = {"loss": value.detach(), "cross_entropy": cross_entropy.detach(), "halt_loss": halt.detach(),
                   "halt_accuracy": judged.float().mean(), "right": segments[-1].right.float().mean()}
        return Loss(value, metrics)

    def halt_logit(self, state: Float[Tensor, "batch length states"], batch: Batch) -> Float[Tensor, "batch"]:
        """Log-odds that the answer decoded from a state is correct: a linear map of the normalised state averaged over
        the rows to predict; in float32 or wider."""
        state = self.model.norm(answer_of(state, self.model.width))
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
        """Steps of all segments of an update together: (without gradient, with gradient)."""
        num = self.supervision.segments_per_update
        return float(num * self.supervision.steps), float(num)

    def layer_forwards(self) -> float:
        return self.cost(*self.expected_depths(), readings=self.supervision.segments_per_update)


class SegmentUpdates(OneStep):
    """One segment per optimiser step, from a state that is carried over from the step before (HRM, TRM).

    A sequence leaves its row when the halting head gives it a log-odds above 0, or after `segments` segments; with the
    probability `explore` it stays for at least a number of segments drawn uniformly from 2 to `segments`. The loss of
    held-out data, and of a batch outside of training, is that of `OneStep` over all segments.

    metrics: those of `OneStep`, here of this segment, `leaving`, the fraction of sequences that leave, and
    `segments_used`, the mean number of segments of these.
    """

    changes = "a step begins with the states that the one before has left"
    one_process = "supervision.update segment carries the states of all sequences in one process"

    def __init__(self, model: LanguageModel, config: RecurrenceConfig, supervision: SupervisionConfig):
        super().__init__(model, config, supervision)
        self.carried: CarriedStates = CarriedStates()

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        if not self.training:
            return super().forward(tokens, random)
        visit = self.carried.visit(self.ask(tokens), random.start)
        start = self.start(visit.batch, random)
        segment = self.segment(start, visit.state_from(self.model.initial_state(start.e, start.noise)))
        left = self.leaving(segment.halts, visit.age + 1, random)
        self.carried.keep(random.start, visit, segment.state, left)
        loss, num = self.loss_of([segment]), left.float().sum()
        used = torch.stack([((visit.age + 1) * left).float().sum(), num])
        return Loss(loss.value, loss.metrics | {"leaving": left.float().mean()}, {"segments_used": used})

    def leaving(self, halts: Bool[Tensor, "batch"], age: Int[Tensor, "batch"],
                random: StepRandom) -> Bool[Tensor, "batch"]:
        """True for each sequence that leaves after its segment number `age`."""
        most = self.supervision.segments
        explores, drawn = random.uniform("explore", (2,)).unbind(1)
        least = torch.where(explores < self.supervision.explore, 2 + (drawn * (most - 1)).long(), 0)
        return (age >= most) | (halts & (age >= to_device(least, age.device)))

    def after_step(self) -> None:
        self.carried.settle()

    def to_carry(self) -> dict[str, Tensor]:
        return self.carried.tensors()

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        self.carried.take_up(tensors)


UPDATES: dict[str, type[OneStep]] = {"batch": OneStep, "segment": SegmentUpdates}
"""Classes by `supervision.update`."""
