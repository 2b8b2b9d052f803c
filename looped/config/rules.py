"""Registry of the training rules (`objective`): what settings, models and reports need to know of each, without torch.

    rule             passes through the core       conditioning   run at a depth by
    full             all, all with gradient        -              the loop
    truncated        sampled, last with gradient   -              the loop
    progressive      sampled twice                 -              the loop
    one-step         a few per segment             -              the loop
    fixed-point      to the fixed point            -              the loop
    ar               one                           -              one pass
    denoise          one                           noise level    the solver
    blockwise        one, of one block             noise level    the solver
    masked           one (of one block)            mask rate      unmasking
    noprop-*         one (of one block)            time           its own steps
    forward-forward  one per layer                 -              its layers

A custom rule is a subclass of `looped.objectives.Objective` with a `rule`, selected by the dotted path of the class.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from looped.config.blocks import check_blocks, check_blockwise
from looped.config.choices import OF_READOUTS, OF_STEPS
from looped.config.denoise import check_guidance, check_layout
from looped.config.local_rules import check_forward_forward, check_noprop, check_noprop_dt
from looped.config.masked import check_masked
from looped.config.revisit import check_revisit
from looped.errors import UserError, did_you_mean
from looped.import_path import class_at

BOUNDARY = ("model.step_embedding", "model.loop_scale", "model.streams", "model.stream_mixing")
"""Settings of what happens between two loop steps, all of which a rule reads, or none."""
THREE = ("text", "puzzles", "classify")
"""The kinds of data with answers to predict."""


def _check_kind(config: Any) -> None:
    config.kind.check(config)


def _mean(config: Any) -> int:
    return config.recurrence.mean


def _one_pass(config: Any) -> int:
    """The depth of one pass through all blocks of the core."""
    return config.blocks.num


def _whole_passes(config: Any) -> float:
    return config.main_depth / config.blocks.num


def _several(config: Any) -> bool:
    return config.blocks.num > 1


def _never(config: Any) -> bool:
    return False


def _always(config: Any) -> bool:
    return True


def _nothing(config: Any) -> dict[str, Any]:
    return {}


def _they_differ(config: Any) -> str:
    return ""


def _same_start(config: Any) -> str:
    """The reason why all trajectories of a loop are the same; "" if they differ."""
    fixed = config.model.state_init not in RANDOM_STARTS and not config.evaluation.state_noise
    return f"model.state_init {config.model.state_init} with evaluation.state_noise 0" if fixed else ""


@dataclass(frozen=True)
class Rule:
    """A training rule.

    name: the value of `objective`. path: dotted path of its class; `paths`: by kind of data, if the class differs.
    kinds: the supported kinds of data. rollout: the way a trained model is run at a depth. depth: the depth that
    represents the trained ones: their mean (their maximum if sampled uniformly), or one pass through all blocks if
    training passes through the core once. reads: the rule-specific settings or sections that it reads. told: the
    setting for the width of the level embedding that conditions the core; None if there is none. sees_all: rows
    attend to later ones too, for every kind. hides: the vocabulary has a mask token. loops: training iterates the core.
    free_depth: training prefers no depth, as with a solver. baseline: the same layers without a loop, the reference of
    other rules. blocks: the core may have several blocks; `independent`: they train without each other.
    trains_one_block: an optimiser step trains one of several blocks. residual_layers: layers on the longest residual
    path in training, if not those of prelude, passes and coda. passes: passes through the whole core per training step.
    as_deep_as_mean: settings that make every step as deep as the mean. one_more: settings with which a solver that
    stops by its residual may apply the core once more; {} if every step applies it as often as counted. choices: the
    choices among trajectories that it supports, of `looped.config.choices`. alike: settings under which all
    trajectories of a problem are the same, "" if they differ. checks: functions that reject a config, in this order.
    """

    name: str
    path: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = THREE
    rollout: Literal["loop", "solver", "unmask", "own"] = "loop"
    depth: Callable[[Any], int] = _mean
    reads: tuple[str, ...] = ()
    told: str | None = None
    sees_all: bool = False
    hides: bool = False
    loops: bool = False
    free_depth: bool = False
    baseline: bool = False
    blocks: bool = False
    independent: bool = False
    trains_one_block: Callable[[Any], bool] = _never
    residual_layers: Callable[[Any], int] | None = None
    passes: Callable[[Any], float] = _whole_passes
    as_deep_as_mean: Callable[[Any], dict[str, Any]] = _nothing
    one_more: Callable[[Any], dict[str, Any]] = _nothing
    choices: tuple[str, ...] = OF_STEPS
    alike: Callable[[Any], str] = _they_differ
    checks: tuple[Callable[[Any], None], ...] = (check_blocks, _check_kind)

    def check(self, config: Any) -> None:
        """Raises ValueError if a config does not fit the rule."""
        if config.blocks.num > 1 and not self.blocks:
            self._refuse_blocks(config.blocks.num)
        if config.model.latent_updates and self.rollout != "loop":
            raise ValueError(f"model.latent_updates {config.model.latent_updates} is a second state of a loop, which "
                             f"objective {self.name} does not run; set it to 0, or objective to full, truncated or "
                             f"one-step")
        for each in self.checks:
            each(config)
        if config.kind.like not in self.kinds:
            raise ValueError(f"objective {self.name} is for {', '.join(self.kinds)}, and this config trains on "
                             f"{config.kind.noun}, {config.kind.source(config)}; set another objective, or leave that "
                             f"out")

    @property
    def bounds_steps(self) -> bool:
        """True if its models have the boundary between loop steps that the config sets."""
        return set(BOUNDARY) <= set(self.reads)

    def _refuse_blocks(self, num: int) -> None:
        if self.rollout == "solver":
            raise ValueError(f"objective {self.name} trains one block on all noise levels, but blocks.num is {num}; "
                             f"set objective to blockwise, or blocks.num to 1")
        *names, last = (rule.name for rule in RULES.values() if rule.blocks)
        raise ValueError(f"objective {self.name} supports only one block, but blocks.num is {num}; set blocks.num to "
                         f"1, or objective to {', '.join(names)} or {last}")


TRIED = ("evaluation.trajectories", "evaluation.choose")
"""Settings read by every rule that can answer a problem more than once."""
RANDOM_STARTS = ("like-init", "noise")
"""Initial states (`model.state_init`) that are drawn anew each time."""
PASS = ("model.state_init", "model.state_std", "model.latent_updates", "evaluation.state_noise", *TRIED)
"""Settings read by every rule that applies the core, if only once."""
LOOP = (*PASS, "recurrence.damping")
"""Settings read by every rule that runs the loop."""
DEEP = (*LOOP, "model.exit_gate", *BOUNDARY)
"""Settings read by the rules that run the loop to several depths: also of the gate that an exit may use."""
# Not by fixed-point: noise that is drawn anew at each application of the core leaves a solver no fixed point.
NOISY = (*DEEP, "recurrence.state_noise")
"""Settings read by the rules that train on the steps of the loop themselves."""

STAGES = ("recurrence.from_share", "recurrence.stages")
"""Settings of the rules whose depth changes over training."""
READ_AT = ("recurrence.loss_on", "recurrence.distil_weight", "recurrence.distil_temperature")
"""Settings of the rules that may decode several steps of a loop."""

SOLVED = ("recurrence.mean", "denoise", *TRIED)
DRAWN_BLOCKS = ("blocks.overlap", "blocks.choose")


def _check_loss_drawn(config: Any) -> None:
    recurrence = config.recurrence
    drawn = any(part.distribution != "fixed" for part in recurrence.parts)
    if recurrence.loss_on != "last" and recurrence.per_sequence and drawn:
        raise ValueError(f"recurrence.loss_on {recurrence.loss_on} needs one depth for the whole batch; set "
                         f"recurrence.per_sequence to false, or recurrence.distribution to fixed")


def _check_mean_listed(config: Any) -> None:
    depths, mean = config.recurrence.listed, config.recurrence.mean
    if depths is not None and mean not in depths:
        near = min(depths, key=lambda depth: (abs(depth - config.recurrence.mean_depth), depth))
        raise ValueError(f"recurrence.mean {mean}, the depth at which the loop is compared and sampled, is not in "
                         f"recurrence.depths {dict(depths)}, so it is never trained; set it to one of them, as {near}")


def _check_stages(config: Any) -> None:
    """Raises ValueError for a stage with settings that the rule does not read."""
    for stage in config.recurrence.stages:
        unread = [name for name in stage.own if f"recurrence.{name}" not in config.rule.reads]
        if unread:
            raise ValueError(f"recurrence.stages sets {' and '.join(unread)} until {stage.until:g}, which objective "
                             f"{config.objective} does not read; leave that out, or set objective to truncated")


def _check_teaches(config: Any) -> None:
    if config.recurrence.loss_on != "distil":
        return
    for recurrence in config.recurrence.parts:
        for setting in ("mean", "backprop"):
            if f"recurrence.{setting}" in config.rule.reads and getattr(recurrence, setting) == 1:
                raise ValueError(f"recurrence.loss_on distil teaches the steps before the last, but recurrence."
                                 f"{setting} 1 leaves none with gradient; set it to 2 or more, or recurrence.loss_on "
                                 f"to last")


def _loss_once(where: str) -> Callable[[Any], None]:
    def check(config: Any) -> None:
        loss_on = config.recurrence.loss_on
        if loss_on != "last":
            raise ValueError(f"recurrence.loss_on {loss_on} does not fit {config.objective}, whose loss is taken "
                             f"{where}; set it to last")

    return check


def _check_gate(config: Any) -> None:
    if config.recurrence.loss_on != "gate":
        return
    if not config.model.exit_gate:
        raise ValueError("recurrence.loss_on gate needs an exit gate, but model.exit_gate is false; set it to true, or "
                         "recurrence.loss_on to every")
    if config.recurrence.from_share:
        raise ValueError(f"recurrence.loss_on gate chooses among passes, but recurrence.from_share "
                         f"{config.recurrence.from_share:g} begins with one; set it to 0")
    if any(part.mean == 1 for part in config.recurrence.parts):
        raise ValueError("recurrence.loss_on gate chooses among passes, but recurrence.mean 1 has only one; set it to "
                         "2 or more, or recurrence.loss_on to last")


def _check_uncounted(config: Any) -> None:
    if config.model.step_embedding != "none":
        raise ValueError(f"model.step_embedding {config.model.step_embedding} tells the core the index of a step, but "
                         f"the solver of {config.objective} seeks one state for all steps; set it to none")


def _check_one_age(config: Any) -> None:
    if config.supervision.update == "segment" and config.model.step_embedding != "none":
        raise ValueError(f"model.step_embedding {config.model.step_embedding} tells the core the index of a step, but "
                         f"under supervision.update segment each sequence of a batch is at another one; set one of "
                         f"them to its default")


def _check_no_gate(config: Any) -> None:
    if config.recurrence.loss_on == "gate":
        raise ValueError(f"recurrence.loss_on gate weights all passes of a loop, but {config.objective} has no "
                         f"gradient in some; set objective to full, or recurrence.loss_on to every")


def _check_whole_passes(config: Any) -> None:
    """Raises ValueError unless the loop ends after a whole pass through the blocks of its core."""
    num = config.blocks.num
    for recurrence in config.recurrence.parts:
        if recurrence.mean % num:
            raise ValueError(f"recurrence.mean {recurrence.mean} ends inside a pass through blocks.num {num} blocks; "
                             f"set it to {max(1, recurrence.mean // num) * num}")


def _check_drawn_passes(config: Any) -> None:
    num = config.blocks.num
    if num == 1:
        return
    for recurrence in config.recurrence.parts:
        if recurrence.distribution != "fixed":
            raise ValueError(f"recurrence.distribution {recurrence.distribution} samples depths that end inside a pass "
                             f"through blocks.num {num} blocks; set it to fixed")
        if recurrence.backprop < num:
            raise ValueError(f"recurrence.backprop {recurrence.backprop} leaves some of blocks.num {num} blocks "
                             f"without gradient; set it to {num} or more")


def _last_stage(config: Any) -> dict[str, Any]:
    """Settings with which every step is one of the last stage."""
    recurrence = config.recurrence
    return {"recurrence.from_share": 0.0, "recurrence.stages": ()} if recurrence.from_share or recurrence.stages else {}


def _as_deep_as_mean(config: Any) -> dict[str, Any]:
    """Settings with a fixed depth at the mean of the distribution, in whole steps; that of Huginn's sampler is one step
    above its setting."""
    recurrence, last = config.recurrence, _last_stage(config)
    if recurrence.distribution == "fixed":
        return last
    return last | {"recurrence.distribution": "fixed", "recurrence.mean": round(recurrence.mean_depth)}


BPTT, NOPROP = "looped.objectives.bptt", "looped.objectives.local_rules.noprop"
LAYOUT = (check_layout, check_blocks)
SOLVER: dict[str, Any] = {"kinds": (*THREE, "generate"), "rollout": "solver", "depth": _one_pass, "free_depth": True,
                          "passes": lambda config: config.denoise.train_steps,
                          "told": "denoise.cond_width", "choices": (*OF_STEPS, "consistent")}
NAMES_CLASSES: dict[str, Any] = {"kinds": ("classify",), "rollout": "own", "choices": OF_READOUTS}
EMBEDDED = ("noprop.embedding", "noprop.dim", "noprop.eta", *TRIED)

RULES: dict[str, Rule] = {rule.name: rule for rule in (
    Rule("full", f"{BPTT}.Full", alike=_same_start, loops=True, blocks=True, as_deep_as_mean=_last_stage,
         reads=(*NOISY, "recurrence.mean", *STAGES, *READ_AT, "recurrence.gate_entropy", "revisit"),
         checks=(_check_stages, _check_gate, _check_teaches, check_revisit, check_blocks, _check_whole_passes,
                 _check_kind)),
    Rule("truncated", f"{BPTT}.Truncated", alike=_same_start, loops=True, blocks=True, as_deep_as_mean=_as_deep_as_mean,
         reads=(*NOISY, "recurrence.mean", "recurrence.backprop", "recurrence.distribution", "recurrence.quantile",
                "recurrence.depths", "recurrence.per_sequence", *STAGES, *READ_AT, "revisit"),
         checks=(_check_no_gate, _check_mean_listed, _check_loss_drawn, _check_teaches, check_revisit, check_blocks,
                 _check_whole_passes, _check_drawn_passes, _check_kind)),
    Rule("progressive", f"{BPTT}.Progressive", alike=_same_start, loops=True,
         reads=(*NOISY, "recurrence.mean", *READ_AT, "recurrence.progressive_weight"),
         checks=(_check_no_gate, _check_teaches, check_blocks, _check_kind)),
    Rule("one-step", "looped.objectives.one_step.OneStep", loops=True, reads=(*NOISY, "supervision"),
         alike=_same_start, choices=(*OF_STEPS, "head"),
         depth=lambda config: config.supervision.segments * (config.supervision.steps + 1),
         passes=lambda config: config.supervision.segments_per_update * (config.supervision.steps + 1),
         checks=(_loss_once("after each segment"), _check_one_age, check_blocks, _check_kind)),
    Rule("fixed-point", "looped.objectives.fixed_point.FixedPoint", loops=True, reads=(*DEEP, "fixed_point"),
         alike=_same_start,
         depth=lambda config: config.fixed_point.max_steps,
         one_more=lambda config: {"fixed_point.max_steps": config.fixed_point.max_steps + 1},
         checks=(_loss_once("at the fixed point"), _check_uncounted, check_blocks, _check_kind)),
    Rule("denoise", "looped.objectives.denoise.Denoise",
         {"generate": "looped.objectives.pixel_denoising.DenoisePixels"},
         **SOLVER, reads=SOLVED, checks=(*LAYOUT, _check_kind, check_guidance)),
    Rule("blockwise", "looped.objectives.blockwise.Blockwise",
         {"generate": "looped.objectives.pixel_denoising.BlockwisePixels"},
         **SOLVER, reads=(*SOLVED, "blocks.partition", *DRAWN_BLOCKS), blocks=True, independent=True,
         trains_one_block=_always, checks=(*LAYOUT, check_blockwise, _check_kind, check_guidance)),
    Rule("masked", "looped.objectives.masked.Masked", kinds=("text",), rollout="unmask", depth=_one_pass,
         free_depth=True, told="masked.cond_width", sees_all=True, hides=True, blocks=True, trains_one_block=_several,
         reads=("recurrence.mean", "masked", "evaluation.levels", *DRAWN_BLOCKS),
         checks=(check_blocks, check_masked, _check_kind)),
    Rule("noprop-dt", f"{NOPROP}.NoPropDT", **NAMES_CLASSES, depth=_one_pass, blocks=True, trains_one_block=_always,
         reads=(*EMBEDDED, "noprop.schedule", "noprop.log_snr"),
         checks=(check_blocks, check_noprop_dt, check_noprop, _check_kind)),
    Rule("noprop-ct", f"{NOPROP}.NoPropCT", **NAMES_CLASSES, depth=_one_pass, told="denoise.cond_width",
         reads=("noprop", "denoise.cond_width", *TRIED),
         checks=(check_blocks, check_noprop, _check_kind)),
    Rule("noprop-fm", f"{NOPROP}.NoPropFM", **NAMES_CLASSES, depth=_one_pass, told="denoise.cond_width",
         reads=(*EMBEDDED, "denoise.cond_width"), checks=(check_blocks, check_noprop, _check_kind)),
    Rule("forward-forward", "looped.objectives.local_rules.forward_forward.ForwardForward", **NAMES_CLASSES,
         depth=lambda config: config.model.num_core_layers, residual_layers=lambda config: 1, passes=lambda config: 1,
         reads=("forward_forward", *TRIED),
         checks=(check_blocks, check_forward_forward, _check_kind)),
    Rule("ar", f"{BPTT}.Autoregressive", alike=_same_start, depth=_one_pass, baseline=True, blocks=True, reads=PASS),
)}

AUTO = "auto"
"""The `objective` that stands for the measured choice (looped.config.auto)."""


@lru_cache
def rule_of(objective: str) -> Rule:
    """The rule of a name, or of the dotted path of a class. Raises UserError."""
    if objective in RULES:
        return RULES[objective]
    if objective == AUTO:
        raise UserError("objective auto is replaced by a rule and its settings when the config of a run is read; here "
                        "name the rule")
    if "." not in objective:
        raise UserError(f"objective '{objective}' is unknown{did_you_mean(objective, (*RULES, AUTO))}")
    rule = getattr(class_at(objective, "objective"), "rule", None)
    if not isinstance(rule, Rule):
        raise UserError(f"objective {objective} has no rule; give the dotted path of a subclass of "
                        f"looped.objectives.Objective whose `rule` is a looped.config.rules.Rule")
    return rule
