"""Rollout of the NoProp and Forward-Forward classifiers; depth is time steps, or layers."""

from collections.abc import Sequence

import torch

from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.inference.choices import Runs
from looped.inference.cost import Cost
from looped.inference.exits import Exit
from looped.inference.rollout import Answered, Rollout
from looped.inference.trajectories import trajectories
from looped.rng import StepRandom


class OwnRollout(Rollout):
    """Classes of images along one trajectory or several; the objective defines the cost of a run."""

    name = "own"

    def answers(self, batch: Batch, depths: Sequence[int], config: EvaluationConfig, random: StepRandom,
                exit: Exit | None = None) -> dict[int, Answered]:
        return {depth: self._answer(batch, depth, config, random) for depth in depths}

    def _answer(self, batch: Batch, depth: int, config: EvaluationConfig, random: StepRandom) -> Answered:
        logits = torch.stack([self.objective.class_logits(batch, depth, random, stream=stream)
                              for stream in trajectories(config)])
        cost = self.answer_cost(depth, config)
        used = torch.full(logits.shape[:2], len(cost.readings), device=logits.device)
        return Answered.of(Runs(batch, logits.unsqueeze(2), used), config.choose, cost)

    def answer_cost(self, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
        before, readings, networks = self.objective.class_cost(depth)
        return Cost(config.trajectories * before, readings, runs=config.trajectories, networks=networks)
