"""The plan of a comparison: its arms and seeds at one budget, and the files of each run.

    OUT/<slug>.yaml             the config of an arm, which `looped train` reads
    OUT/<slug>-<seed>/          a run folder per seed; eval/compare.json holds its evaluation
    OUT/logs/<slug>-<seed>.log  output of the run's process
    OUT/compare.jsonl, compare.md, plots/*.png, report.html
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped.config import Config, dump_config, load_config
from looped.config.arms import Arm, parse_arms
from looped.errors import UserError
from looped.training.checkpoint import list_checkpoints, write_text
from looped.training.resume_rules import differences

NUM_EVALS = 20
"""Evaluations over the budget if the config sets no training.num_evals. Evaluating every n steps instead would give
arms of different speed curves of different resolution."""


AGAIN = "bring the old data back, or choose another --out"
"""Fix named in the error if a comparison resumes and the data has changed."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a comparison: an arm with a seed."""

    arm: Arm
    seed: int
    run: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def config(self) -> Config:
        return self.arm.config.replace(seed=self.seed)

    @property
    def text_depth(self) -> int:
        """The depth of the samples that represent the arm."""
        return self.arm.config.sample_depth

    @property
    def text_depths(self) -> list[int]:
        """The depths at which samples are generated."""
        if self.arm.config.rule.baseline:
            return [self.text_depth]
        return sorted({*self.arm.config.evaluation.sample_depths, self.text_depth})


@dataclass(frozen=True)
class Plan:
    """Arms, each a change to `config`, at one budget. `places` lists their runs seed by seed, so that an interrupted
    comparison has runs of every arm."""

    out: Path
    config: Config
    arms: list[Arm]
    num_seeds: int
    unit: str
    amount: int
    depths: list[int]

    @property
    def places(self) -> list[RunSpec]:
        return [RunSpec(arm, seed, self.out / f"{arm.slug}-{seed}") for seed in range(self.num_seeds)
                for arm in self.arms]

    @property
    def named(self) -> dict[str, str]:
        """Name -> full text, for the arms that were given a name."""
        return {arm.name: arm.text for arm in self.arms if arm.name != arm.text}

    def yaml(self, arm: Arm) -> Path:
        """The config file of an arm."""
        return self.out / f"{arm.slug}.yaml"

    def log(self, place: RunSpec) -> Path:
        """The log file of a run's process."""
        return self.out / "logs" / f"{place.run.name}.log"


def make_plan(config: Config, objectives: str, *, budget: tuple[str, int | None], num_seeds: int,
              depths: Sequence[int] | None, out: Path) -> Plan:
    """The plan for the flags of `looped compare`; `budget`: (unit, amount). Raises UserError, for example if the budget
    has no amount."""
    unit, amount = budget
    if amount is None and config.training.budget_unit != unit:
        raise UserError(f"--budget {unit} has no amount, since training.budget is in {config.training.budget_unit}; "
                        f"give the number of {unit} with --amount")
    config = config.replace(**{
        "training.budget": amount or config.training.budget, "training.budget_unit": unit, "training.eval_every": 0,
        "training.num_evals": config.training.num_evals or NUM_EVALS})
    mean, arms = config.recurrence.mean, parse_arms(config, objectives)
    for arm in arms:
        if arm.config.blocks.alone is not None:
            raise UserError(f"arm '{arm.name}' trains block {arm.config.blocks.alone} alone (blocks.alone), but a "
                            f"comparison measures whole models; leave it out")
    return Plan(out, config, arms, num_seeds, unit, config.training.budget,
                sorted(set(depths or (1, mean, 4 * mean))))


def write_configs(plan: Plan) -> None:
    """Write OUT/<slug>.yaml for every arm. Raises UserError if OUT holds another comparison, cannot be written, or lies
    where data are read."""
    _check_outside(plan)
    try:
        (plan.out / "logs").mkdir(parents=True, exist_ok=True)
        for arm in plan.arms:
            _check_unchanged(plan, arm)
            write_text(plan.yaml(arm), dump_config(arm.config))
    except OSError as error:
        raise UserError(f"cannot write to {plan.out}: {error.strerror or error}; choose another --out") from None


def _check_outside(plan: Plan) -> None:
    """Raises UserError if OUT is in a folder of the data, to which the comparison's own files would be added."""
    data, out = plan.config.data, plan.out.resolve()
    entries = [*data.path, *(each for source in data.mixture.values() for each in source.path), plan.config.images.path]
    for entry in filter(None, entries):
        if out.is_relative_to(Path(entry).expanduser().resolve()):
            raise UserError(f"{plan.out} is in {entry}, where the data are read, so that the comparison's own files "
                            f"would be read as well; choose another --out")


def _check_unchanged(plan: Plan, arm: Arm) -> None:
    """Raises UserError if the config of a trained arm has changed; its evaluation settings may."""
    trained = any(list_checkpoints(place.run) for place in plan.places if place.arm is arm)
    if not trained or not plan.yaml(arm).exists():
        return
    change = next(differences(fixed(load_config(plan.yaml(arm))), fixed(arm.config)), None)
    if change is not None:
        raise UserError(f"{plan.out} was started with {change.setting} {change.old!r} for {arm.name}, but now it is "
                        f"{change.new!r}; choose another --out, or remove the folder")


def fixed(config: Config) -> Mapping[str, Any]:
    """The settings that training depends on: all but `evaluation`."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name != "evaluation"}
