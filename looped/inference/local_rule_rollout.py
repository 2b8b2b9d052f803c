"""Rollout of the NoProp and Forward-Forward classifiers; depth is time steps, or layers."""

from collections.abc import Sequence

import torch

from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.inference.cost import Cost
from looped.inference.exits import Exit
from looped.inference.rollout import Answered, Rollout, trajectories
from looped.rng import StepRandom


class OwnRollout(Rollout):
    """The most likely class of each image under the mean over trajectories; the objective defines the cost of a run."""

    name = "own"

    def answers(self, batch: Batch, depths: Sequence[int], config: EvaluationConfig, random: StepRandom,
                exit: Exit | None = None) -> dict[int, Answered]:
        return {depth: self._answer(batch, depth, config, random) for depth in depths}

    def _answer(self, batch: Batch, depth: int, config: EvaluationConfig, random: StepRandom) -> Answered:
        runs = [self.objective.class_logits(batch, depth, random, stream=stream) for stream in trajectories(config)]
        named = torch.stack([logits.softmax(-1) for logits in runs]).mean(0).argmax(-1)
        cost = self.answer_cost(depth, config)
        return Answered.by(named.unsqueeze(1), named.new_full((len(runs), len(named)), len(cost.readings)), cost)

    def answer_cost(self, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
        before, readings, networks = self.objective.class_cost(depth)
        return Cost(config.trajectories * before, readings, runs=config.trajectories, networks=networks)
