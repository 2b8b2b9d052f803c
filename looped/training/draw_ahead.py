"""Random draws and data of the next training step, made by a thread while the device works: the same bits, ahead.

A step's draws are functions of (seed, step, stream, row), so they can be made before the rule asks for them. Which ones
it asks for is learned from the steps that were run: they depend on the rule's decisions (`StepRandom.decide`) alone.
"""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from looped.devices import pinned, to_device
from looped.rng import StepRandom

Asked = tuple[str, str, tuple[int, ...]]
"""(kind of draw, stream, shape)."""


class StepDraws(StepRandom):
    """The draws of `random`, some of them made before. What is missing is drawn when asked for, and listed, unless the
    draws are `complete`: then a step of the same decisions has been run, and nothing is missing."""

    def __init__(self, random: StepRandom, made: dict[Asked, Tensor | None] | None = None,
                 outcomes: dict[str, Any] | None = None, *, complete: bool = False):
        super().__init__(random.seed, random.step, start=random.start, count=random.count, total=random.total,
                         device=random.device, rows=random.rows)
        self.random = random
        self.made: dict[Asked, Tensor | None] = {} if made is None else made
        self.outcomes: dict[str, Any] = {} if outcomes is None else outcomes
        self.complete = complete
        self.asked: dict[Asked, None] = {}
        self.decided: dict[str, tuple[Callable[[StepRandom], Any], Any]] = {}

    def of(self, places: Sequence[int]) -> StepRandom:
        """The randomness of some of the rows, whose draws are made when asked for."""
        return self.random.of(places)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        found = self._look_up("normal", stream, tuple(shape))
        return self.random.normal(stream, shape) if found is None else found

    def uniform(self, stream: str, shape: Sequence[int]) -> Tensor:
        found = self._look_up("uniform", stream, tuple(shape))
        return super().uniform(stream, shape) if found is None else found

    def stratified(self, stream: str) -> Tensor:
        found = self._look_up("stratified", stream, ())
        return super().stratified(stream) if found is None else found

    def _look_up(self, *asked: Any) -> Tensor | None:
        if not self.complete:
            self.asked[asked] = None
        return self.made.get(asked)

    def decide(self, name: str, draw: Callable[[StepRandom], Any]) -> Any:
        if self.complete and name in self.outcomes:
            return self.outcomes[name]
        self.complete = False  # no step before has taken this decision
        outcome = self.outcomes[name] if name in self.outcomes else draw(self)
        self.decided[name] = draw, outcome
        return outcome

    def on_device(self) -> "StepDraws":
        """Move the normal draws to the device without waiting, or make them there (`DeviceRandom`); uniform ones are
        used on the host."""
        for asked, values in self.made.items():
            if values is None:
                self.made[asked] = draw(self.random, asked)
            elif asked[0] == "normal":
                self.made[asked] = to_device(values, self.device)
        return self


@dataclass
class DrawPlan:
    """The draws of a run's steps: the decisions in their order, and the draws by the outcomes of these."""

    decisions: dict[str, Callable[[StepRandom], Any]] = field(default_factory=dict)
    asked: dict[Hashable, tuple[Asked, ...]] = field(default_factory=dict)
    last: tuple[Asked, ...] = ()

    def learn(self, draws: StepDraws) -> None:
        """Add what a step has asked for."""
        if not draws.complete:  # new dictionaries, since the thread may be reading these
            self.last = tuple(draws.asked)
            key = self._key({name: outcome for name, (_, outcome) in draws.decided.items()})
            self.decisions = self.decisions | {name: draw for name, (draw, _) in draws.decided.items()}
            self.asked = self.asked | {key: self.last}

    def make(self, random: StepRandom) -> StepDraws:
        """The draws of a step, as far as they are the host's: all of them if its decisions are known, else those of the
        last step."""
        outcomes = {name: draw(random) for name, draw in self.decisions.items()}
        known = self.asked.get(self._key(outcomes))
        here = random.on_host()
        made = {asked: pinned(draw(here, asked), random.device) if asked[0] in random.AHEAD else None
                for asked in (self.last if known is None else known)}
        return StepDraws(random, made, outcomes, complete=known is not None)

    @staticmethod
    def _key(outcomes: dict[str, Any]) -> Hashable:
        """Outcomes that are numbers; tensors, one depth per sequence, do not change what is drawn."""
        parts = {name: value if isinstance(value, tuple) else (value,) for name, value in outcomes.items()}
        return tuple((name, value) for name, value in parts.items()
                     if not any(isinstance(each, Tensor) for each in value))


def draw(random: StepRandom, asked: Asked) -> Tensor:
    """The draw that was asked for."""
    kind, stream, shape = asked
    return random.stratified(stream) if kind == "stratified" else getattr(random, kind)(stream, shape)


class DrawAhead:
    """The batch and the draws of each micro-batch, prepared during the one before.

    prepare: (step, micro) -> (batch on the host, StepRandom). threaded: by a thread, otherwise when asked for; both
    give the same.
    """

    def __init__(self, prepare: Callable[[int, int], tuple[Any, StepRandom]], num_micro: int, *, threaded: bool):
        self.prepare, self.num_micro = prepare, num_micro
        self.plan: DrawPlan = DrawPlan()
        self.thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "draw-ahead") if threaded else None
        self.coming: tuple[tuple[int, int], Future] | None = None

    def get(self, step: int, micro: int) -> tuple[Any, StepDraws]:
        """(batch, draws) of a micro-batch; give the draws to `used` once the rule has run."""
        place, coming, self.coming = (step, micro), self.coming, None
        batch, draws = coming[1].result() if coming and coming[0] == place else self._work(place)
        after = (step, micro + 1) if micro + 1 < self.num_micro else (step + 1, 0)
        if self.thread is not None:
            self.coming = after, self.thread.submit(self._work, after)
        return batch, draws

    def used(self, draws: StepDraws) -> None:
        """Learn from a micro-batch that has run."""
        self.plan.learn(draws)

    def close(self) -> None:
        """End the thread."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def _work(self, place: tuple[int, int]) -> tuple[Any, StepDraws]:
        batch, random = self.prepare(*place)
        return batch, self.plan.make(random)
