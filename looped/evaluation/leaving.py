"""Early exits on text: every token of known texts leaves the loop by itself, as soon as its readout has settled.

A token that has left is read there; its state goes on, so that later tokens attend to what all steps make of it, as
with a cache that is filled to the deepest step.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from looped.config.training import EvaluationConfig
from looped.evaluation.rows import Row, summarise
from looped.inference.exits import Exit
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective, evaluating
from looped.rng import StepRandom


@torch.no_grad()
def text_exit_rows(objective: Objective, tokens: Int[Tensor, "num length_and_one"], depth: int, exits: Sequence[Exit],
                   *, seed: int = 0, batch_size: int = 16) -> Iterator[list[Row]]:
    """With each exit, of at most `depth` steps: nats/token where each token left (`nats_with_exit`), the mean steps
    (`steps_used`), and what leaving early costs (`lost_by_exit`: nats/token less those of all the steps, paired over
    sequences). Raises UserError for an exit that the run cannot take, and for a run without a loop.

    Layer passes are those that a token's steps and their readouts take.
    """
    rollout = rollout_of(objective)
    found: list[list[tuple[Tensor, Tensor]]] = []
    with evaluating(objective):
        for first in range(0, len(tokens), batch_size):
            rows = tokens[first : first + batch_size]
            random = StepRandom(seed, 0, start=first, count=len(rows), total=len(tokens), device=rows.device)
            mean, left = objective.ask(rows).mean, rollout.leave(rows, depth, [None, *exits], random)
            found.append([(mean(losses).cpu().double(), used.cpu()) for losses, used in left])
    full, *each = ([torch.cat(part) for part in zip(*parts, strict=True)] for parts in zip(*found, strict=True))
    cost = rollout.answer_cost(depth, EvaluationConfig(), early=True)
    for rule, (losses, used) in zip(exits, each, strict=True):
        layers, evaluations = (figure.mean().item() for figure in cost.spent(used.flatten().unsqueeze(0)))
        fields = {"depth": depth, "by": rule.name}
        spent = {"layer_forwards": layers, "evaluations": evaluations}
        yield [summarise("nats_with_exit", losses, **fields, **spent),
               summarise("steps_used", used.double().mean(1), **fields, **spent),
               summarise("lost_by_exit", losses - full[0], **fields)]
