"""Names of the choices among several trajectories (`evaluation.choose`), and what each one needs of a rule.

Imports no torch; the classes are in `looped.inference.choices`.
"""

from typing import Any

CHOICES = {
    "mean": "the most likely answer under their mean readout",
    "vote": "the answer that most of them give",
    "cell-vote": "in each cell the symbol that most of them give",
    "confidence": "the one whose readout has the highest mean log-probability of its own answer",
    "residual": "the one whose latent moved least in its last three steps, relative to its norm",
    "head": "the one that the halting head of one-step rates most likely right",
    "consistent": "the one that a denoiser is most confident of on reading it again",
}
"""Name -> description of the chosen answer."""
OF_READOUTS = ("mean", "vote", "cell-vote", "confidence")
"""Choices that need no more than the readout at the end of each trajectory."""
OF_STEPS = (*OF_READOUTS, "residual")
"""Choices that also need the latents on the way."""
NEEDS = {"residual": "the latents of a loop or a solver", "head": "a halting head, which one-step trains",
         "consistent": "a denoiser that reads an answer again"}
"""Choice -> what a rule must have for it."""


def check_choice(config: Any) -> None:
    """Raises ValueError if several trajectories are to be judged by something that the rule does not have."""
    choose, supported = config.evaluation.choose, config.rule.choices
    if config.evaluation.trajectories > 1 and choose in NEEDS and choose not in supported:
        raise ValueError(f"evaluation.choose {choose} needs {NEEDS[choose]}, and objective {config.objective} has "
                         f"none; set it to {', '.join(supported[:-1])} or {supported[-1]}")
