"""Checks of a launcher's environment variables, so that none of them changes what a config computes.

`accelerate launch` passes its flags and its file of defaults to a training process as environment variables, and most
of them override the arguments of `accelerate.Accelerator`: accumulation steps divide every gradient, a dynamo backend
compiles the whole model, a plugin shards it. A launcher decides the number and place of processes. Any other variable
is accepted if it is off or agrees with the config, and refused otherwise.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from looped.config import Config
from looped.errors import UserError
from looped.precision import Precision, training_device

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}
"""The dtype of `Precision` in accelerate's terms."""

OFF = ("", "0", "no", "n", "none", "false", "f", "off")


@dataclass(frozen=True)
class Asked:
    """A launcher variable, its values without effect, and the setting that decides instead."""

    variable: str
    nothing: tuple[str, ...]
    setting: str
    ours: Callable[[Config], object]

    def check(self, value: str, config: Config) -> None:
        """Raises UserError if the launcher's variable contradicts the setting."""
        ours = self.ours(config)
        if value.strip().lower() not in self.nothing and not _same(value, ours):
            raise UserError(f"the launcher sets {self.variable} to {value!r}, but the config has {self.setting} "
                            f"{ours}; the config decides, so set {self.setting}, and unset {self.variable} or leave it "
                            f"out of the launcher's flags and configuration")


@dataclass(frozen=True)
class Refused:
    """A launcher variable for a mode of training that looped does not support, and the supported alternative."""

    variable: str
    way_out: str

    def check(self, value: str, config: Config) -> None:
        """Raises UserError if the launcher's variable is on."""
        if value.strip().lower() not in OFF:
            raise UserError(f"the launcher sets {self.variable} to {value!r}, which looped does not support: "
                            f"{self.way_out}, and unset {self.variable} or leave it out of the launcher's flags and "
                            f"configuration")


PLAIN = "several processes train by DistributedDataParallel only, so use its distributed_type (MULTI_GPU, MULTI_CPU)"
FLOAT = "set training.precision to fp32 or bf16"

READ: tuple[Asked | Refused, ...] = (
    Asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto"), "training.accumulation",
          lambda config: config.training.accumulation),
    Asked("ACCELERATE_GRADIENT_CLIPPING", ("auto", "none"), "optim.grad_clip", lambda config: config.optim.grad_clip),
    Asked("ACCELERATE_MIXED_PRECISION", ("no",), "training.precision",
          lambda config: Precision.of(config, training_device()).dtype),
    Asked("ACCELERATE_DYNAMO_BACKEND", ("no",), "training.compile",
          lambda config: "inductor" if config.training.compile else "false"),
    Refused("ACCELERATE_FP8_BACKEND", FLOAT),
    Refused("ACCELERATE_DOWNCAST_BF16", FLOAT),
    Refused("XLA_USE_BF16", FLOAT),
    Refused("XLA_DOWNCAST_BF16", FLOAT),
    Refused("ACCELERATE_USE_DEEPSPEED", PLAIN),
    Refused("ACCELERATE_USE_FSDP", PLAIN),
    Refused("ACCELERATE_USE_MEGATRON_LM", PLAIN),
    Refused("ACCELERATE_USE_PARALLELISM_CONFIG", PLAIN),
    Refused("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", PLAIN),
)
"""All variables that accelerate 1.15 reads and that change results; those of a plugin are read only if it is on."""


def check_launcher(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError, on all processes alike, for the first launcher variable that contradicts the config."""
    for each in READ:
        if each.variable in environment:
            each.check(environment[each.variable], config)


def _same(value: str, ours: object) -> bool:
    try:
        return float(value) == float(str(ours))
    except ValueError:
        return value.strip().lower() == str(ours).lower()
