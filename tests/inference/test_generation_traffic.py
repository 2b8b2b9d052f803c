"""Generation by every rule on a device, pretended: no token waits for a copy, and the host looks every eight tokens."""

from pathlib import Path

import pretend_device
import pytest
import torch
from pretend_device import Counts, pretend

from looped.config import load_config
from looped.data.batch import Batch
from looped.diffusion.samplers import SAMPLERS
from looped.inference.autoregressive import CHECK_EVERY
from looped.inference.exits import Exit
from looped.inference.generate import generate
from looped.inference.rollout import answer
from looped.inference.sequence_batch import NOTHING
from looped.models.build import build
from looped.objectives import build_objective

pytestmark = pytest.mark.usefixtures("unchecked")  # the checks of shapes would read and copy as well

V, DEPTH, FEW, MORE = 40, 3, 2, 5
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8}
BLOCKS = {"denoise.block_size": 2, "data.length": 8, "evaluation.prompt_length": 4}


def denoise(context, **changes):
    return {"objective": "denoise", "denoise.context": context} | {f"denoise.{k}": v for k, v in changes.items()}


LOOPS = {"ar": {"objective": "ar"}, "full": {"objective": "full"}, "truncated": {"objective": "truncated"}}
DENOISERS = {
    **{f"inject, {solver}": denoise("inject", solver=solver) for solver in ("ancestral", "heun")},
    **{f"context, {solver}": denoise("context", solver=solver) for solver in SAMPLERS if solver != "heun"},
    "concat": denoise("concat"), "a soft bridge": denoise("concat", bridge="soft", carry="latent"),
    "concat, blocks": denoise("concat") | BLOCKS,
    "context, blocks from the left": denoise("context", order="left-to-right") | BLOCKS,
    "inject, core of two blocks": denoise("inject") | {"objective": "blockwise", "blocks.num": 2},
}
RULES = LOOPS | DENOISERS
COPIES = {"loop": 2, "denoise": 4, "padded": 2}
"""Copies a token: its draw, a loop's initial state or a solver's noise, draws of the bridge, noise of the token before;
with padding the lengths for the mask, and for a block another mask."""
PADDED = ["ar", "inject, ancestral", "concat", "concat, blocks", "inject, core of two blocks"]
LENGTHS = torch.tensor([5, 2, 3])


def make(flags, end=None):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V))
    objective.end_of_text = end
    return objective


def prompt():
    return torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(0))


def written(objective, num_tokens, depth=DEPTH, **settings):
    return generate(objective, prompt(), num_tokens=num_tokens, depth=depth, seed=1, **settings)


def away(flags, num_tokens, end=None, depth=DEPTH, **settings):
    """(the texts of a device, what it was asked)."""
    with pretend() as device:
        objective, given = make(flags, end).to(device), prompt().to(device)
        pretend_device.seen = counts = Counts()
        texts = generate(objective, given, num_tokens=num_tokens, depth=depth, seed=1, **settings)
        pretend_device.seen = Counts()
        return texts.held, counts


def per_token(flags, **settings):
    """(kernels, reads, copies) of a token; no copy is waited for, and the texts are those of the processor."""
    texts, more = away(flags, MORE, **settings)
    few = away(flags, FEW, **settings)[1]
    assert not more.waits
    assert torch.equal(texts, written(make(flags), MORE, **settings))
    return [(sum(getattr(more, name).values()) - sum(getattr(few, name).values())) / (MORE - FEW)
            for name in ("kernels", "reads", "copies")]


@pytest.mark.parametrize("rule", RULES)
def test_a_token_is_not_read_and_waits_for_no_copy(rule):
    kernels, reads, copies = per_token(RULES[rule])
    assert kernels > 100
    assert reads == 0
    assert copies <= COPIES["loop" if rule in LOOPS else "denoise"]


@pytest.mark.parametrize("rule", PADDED)
def test_padded_prompts_are_not_read_either(rule):
    _, reads, copies = per_token(RULES[rule], lengths=LENGTHS)
    assert reads == 0
    assert copies <= COPIES["loop" if rule in LOOPS else "denoise"] + COPIES["padded"]


def letters(ids):
    return "".join(chr(97 + number % 26) for number in ids)


ENDINGS = {"an end of text": {"end": 3}, "a stop string": {"stop": ["zz"], "decode": letters},
           "both": {"end": 7, "stop": ["xy", "q"], "decode": letters}}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("rule", ["ar", "context, ancestral", "concat, blocks"])
def test_ends_are_looked_for_every_few_tokens_and_cut_as_ever(rule, ending):
    """The same texts, whether the host looks at each token or at every eighth."""
    flags, settings = RULES[rule], {"depth": 2, **ENDINGS[ending]}
    end = settings.pop("end", None)
    texts, counts = away(flags, 20, end, **settings)
    assert torch.equal(texts, written(make(flags, end), 20, **settings))
    assert sum(counts.reads.values()) <= 2 + 19 // CHECK_EVERY  # the prompt's check and the cut
    assert not counts.waits


def test_a_device_stops_soon_after_the_last_end():
    """The most likely tokens come to repeat one, here within eight tokens."""
    end = int(written(make(LOOPS["ar"]), 12, top_k=1)[0, -1])
    texts, short = away(LOOPS["ar"], 24, end, top_k=1)
    _, long = away(LOOPS["ar"], 24, top_k=1)
    assert torch.equal(texts, written(make(LOOPS["ar"], end), 24, top_k=1))
    assert int((texts != NOTHING).sum(1).max()) <= CHECK_EVERY
    assert sum(short.kernels.values()) < 0.5 * sum(long.kernels.values())


@pytest.mark.parametrize("flags", [{}, {"blocks.num": 2}], ids=["one core", "two blocks"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "padded"])
def test_masked_diffusion_reads_nothing_until_its_end(flags, lengths):
    flags = {"objective": "masked", "masked.cond_width": 8, **flags}
    texts, counts = away(flags, 8, lengths=lengths)
    assert torch.equal(texts, written(make(flags), 8, lengths=lengths))
    assert sum(counts.reads.values()) == 2, counts.reads  # the prompt's check, and the cut
    assert not counts.waits


# ---- problems, with and without an exit

RUNS = {"loop": {"objective": "full"}, "solver": {"denoise.order": "together", "denoise.solver": "euler"},
        "solver that draws": {"denoise.order": "together", "denoise.solver": "ancestral"}}


def asked(flags, depth, exit):
    config = load_config(Path(__file__).parents[2] / "configs" / "sudoku4-denoise.yaml",
                         {"model.width": 16, "model.num_heads": 2, **flags})
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(1, 5, (3, 16), generator=generator)
    places = torch.arange(16).view(1, 16, 1).expand(3, 16, 1)
    batch = Batch(cells, cells, scored=cells > 2, positions=places, causal=False)
    with pretend() as device:
        objective, batch = build_objective(config, build(config, V)).to(device), batch.to(device)
        pretend_device.seen = counts = Counts()
        answer(objective, batch, [depth], config, exit=exit)
        pretend_device.seen = Counts()
    return sum(counts.reads.values()), sum(counts.waits.values())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("exit", "reads"), [(None, 0), ("answer=99", 1)])
def test_a_step_is_read_once_if_problems_may_exit_and_else_never(run, exit, reads):
    (few, _), (more, waits) = (asked(RUNS[run], depth, exit and Exit.parse(exit)) for depth in (3, 7))
    assert (more - few) / 4 == reads
    assert waits == 0
