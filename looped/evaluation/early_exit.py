"""Early exit per token, on known texts: each token exits the loop as soon as its readout has converged.

A token is scored at its exit. Its state still runs through all steps, so later tokens can attend to it at every step,
as with a KV cache filled to the deepest step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.config.training import EvaluationConfig
from looped.evaluation.intervals import Clusters
from looped.evaluation.metric_rows import Row, summarise
from looped.inference.exits import Exit, Settled
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective, evaluating, require_text
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


@dataclass(frozen=True)
class ExitLosses:
    """All tokens of known texts under one exit. nats: of each token at its exit. used: its steps. means: nats/token of
    each text."""

    nats: Float[Tensor, "num length"]
    used: Int[Tensor, "num length"]
    means: Float[Tensor, "num"]


@torch.no_grad()
def losses_with_exits(objective: Objective, tokens: Int[Tensor, "num length_and_one"], depth: int,
                      exits: Sequence[Exit | str | Settled], *, seed: int = 0,
                      batch_size: int = 16) -> list[ExitLosses]:
    """Losses with all `depth` steps, then under each exit with at most `depth`; one unroll serves all.

    exits: as `--exits` names them (`"kl=1e-4"`), objects, or functions `(moment) -> Bool[Tensor, "rows"]` of a
    `looped.inference.exits.Moment`; here each token is a problem by itself. Raises UserError for an exit that the run
    does not support, and for a run without a loop.
    """
    require_text(objective, "nats/token")
    rollout, exits = rollout_of(objective), [Exit.of(rule) for rule in exits]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    with evaluating(objective):
        for first in range(0, len(tokens), batch_size):
            rows = tokens[first : first + batch_size]
            random = StepRandom(seed, 0, start=first, count=len(rows), total=len(tokens), device=rows.device)
            mean, left = objective.ask(rows).mean, rollout.leave(rows, depth, [None, *exits], random)
            found.append([(losses.cpu(), used.cpu(), mean(losses).cpu().double()) for losses, used in left])
    return [ExitLosses(*(torch.cat(part) for part in zip(*parts, strict=True))) for parts in zip(*found, strict=True)]


def text_exit_rows(objective: Objective, left: Sequence[ExitLosses], depth: int, exits: Sequence[Exit],
                   clusters: Clusters | None = None) -> Iterator[list[Row]]:
    """Rows per exit, from the result of `losses_with_exits`: nats/token at the exits (`nats_with_exit`), the mean steps
    (`steps_used`), and the cost of exiting early (`lost_by_exit`: nats/token with the exit minus nats/token with all
    steps, paired over sequences). clusters: the document of each sequence.

    Layer passes are those of a token's own steps and their readouts.
    """
    full, *each = left
    cost = rollout_of(objective).answer_cost(depth, EvaluationConfig(), early=True)
    for rule, early in zip(exits, each, strict=True):
        layers, evaluations = (figure.mean().item() for figure in cost.spent(early.used.flatten().unsqueeze(0)))
        fields = {"depth": depth, "by": rule.name, "clusters": clusters}
        spent = {"layer_forwards": layers, "evaluations": evaluations}
        yield [summarise("nats_with_exit", early.means, **fields, **spent),
               summarise("steps_used", early.used.double().mean(1), **fields, **spent),
               summarise("lost_by_exit", early.means - full.means, **fields)]
