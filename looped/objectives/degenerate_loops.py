"""Warnings for configs that fail by construction: the state grows with depth, the loop never reads its input, or the
exit gate is not trained.

Norms inside the layers hide the size of the state from the loss, which grows without bound unless a step scales the
state down again: by a norm on the residual sum (sandwich), or an injection that mixes state and input instead of adding
(linear, gated, diagonal). At initialisation, root mean square after 1, 4, 16 and 64 steps: `add` 0.6, 2.5, 10, 40;
`none` from the embedding 0.6, 0.7, 1.2, 4.5; all others are constant from 8 steps on.
"""

from looped.config import Config
from looped.nn.layers import BLOCKS

KEPT = "set model.block to sandwich or original, or model.injection to linear, gated or diagonal"


def cautions(config: Config) -> list[str]:
    """One sentence per fault of a config whose training unrolls the loop; none for other rules."""
    model, found = config.model, _of_gate(config)
    if not config.rule.loops or config.main_depth <= config.blocks.num or model.core is not None:
        return found
    if model.injection == "none" and model.state_init != "embedding":
        found.append(f"with model.injection none and model.state_init {model.state_init} the loop never reads its "
                     f"input; set model.injection to linear, or model.state_init to embedding")
    if not BLOCKS[model.block].on_sum and model.loop_norm != "each-pass" and model.injection in ("add", "none"):
        found.append(f"with model.injection {model.injection} and model.block {model.block} nothing scales the state "
                     f"down between steps, so it grows with depth while norms hide that from the loss; {KEPT}")
    return found


def _of_gate(config: Config) -> list[str]:
    loss_on = config.recurrence.loss_on
    if not config.model.exit_gate or not config.rule.loops or loss_on == "gate":
        return []
    return [f"model.exit_gate is not trained by objective {config.objective} with recurrence.loss_on {loss_on}, and "
            f"keeps its initial weights; to train it, set objective to full and recurrence.loss_on to gate"]
