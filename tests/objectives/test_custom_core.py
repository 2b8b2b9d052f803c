"""A custom core is tested with the masks of its run: one that reads hidden rows is refused, under every rule."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from looped import (
    Core,
    Full,
    Packed,
    Table,
    attention,
    build,
    build_objective,
    evaluate_depth,
    generate,
    load_config,
    load_run,
)
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_run
from looped.evaluation.options import Options
from looped.evaluation.probes import later_tokens, probe
from looped.hub.logits_api import LoopReader
from looped.inference.padding import Padding, Reading
from looped.nn.cache import Cache
from looped.nn.masks import Causal
from looped.objectives.leaks import reached
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")

V, L, WIDTH, END = 40, 12, 16, 0
SMALL = {"model.width": WIDTH, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8,
         "denoise.context": "inject", "data.length": L, "recurrence.mean": 2, "evaluation.prompt_length": 4}


class Attending(nn.Module):
    """state' = tanh(e + attention among the rows of e), under the mask of the run unless another is given."""

    def __init__(self, mask=None, share=1.0):
        super().__init__()
        self.mask = mask
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, state, e, cond, rows):
        x = e.unsqueeze(2)
        return torch.tanh(e + self.share * attention(x, x, x, self.mask or rows.mask).squeeze(2))


class Tight(Attending):
    def __init__(self, *sizes):
        super().__init__()


class Leaky(Attending):
    def __init__(self, *sizes):
        super().__init__(Full())


class Remembering(Attending):
    """The same with the rows of earlier pieces of a text."""

    def forward(self, state, e, cond, rows):
        x = e.unsqueeze(2)
        k, v = (x, x) if rows.cache is None else rows.cache.layer(0).append(x, x)
        return torch.tanh(e + self.share * attention(x, k, v, self.mask or rows.mask).squeeze(2))


class Kept(Remembering):
    def __init__(self, *sizes):
        super().__init__()


class RowByRow(nn.Module):
    def forward(self, state, e, cond, rows):
        return torch.tanh(state + e)


def make(core, **flags):
    config = load_config(None, SMALL | flags)
    model = build(config, V)
    model.recurrence.core = Core(core)
    return build_objective(config, model, END)


def tokens(num=4):
    return torch.randint(1, V, (num, L + 1), generator=torch.Generator().manual_seed(0))


def evaluate(objective):
    return evaluate_depth(objective, tokens(), [1, 2], bytes_per_token=1.0)


@pytest.mark.parametrize("rule", ["full", "truncated", "ar", "denoise"])
def test_no_likelihood_is_given_for_a_core_that_reads_later_rows(rule):
    with pytest.raises(UserError, match=r"Attending lets row \d+ change row \d+, from which .* \(Causal\) hides it"):
        evaluate(make(Attending(Full()), objective=rule))
    evaluate(make(Attending(), objective=rule))  # the mask of the run


@pytest.mark.parametrize("flags", [{"model.core_runs": 2}, {"objective": "full", "model.latent_updates": 2}], ids=str)
def test_a_core_that_a_step_runs_several_times_is_tested_as_well(flags):
    for name, refused in (("Leaky", True), ("Tight", False)):
        own = {"objective": "denoise", "model.core": f"{__name__}.{name}"} | flags
        rule = build_objective(config := load_config(None, SMALL | own), build(config, V), END)
        if refused:
            with pytest.raises(UserError, match=r"^Leaky lets row \d+ change row \d+"):
                evaluate(rule)
        else:
            evaluate(rule)


def test_a_core_that_reads_other_documents_is_refused_where_they_are_separate():
    evaluate(make(Attending(Causal()), objective="full"))
    with pytest.raises(UserError, match=r"Attending lets row 0 change row 6.*\(Packed\)"):
        evaluate(make(Attending(Causal()), objective="full", **{"data.documents": "separate"}))
    evaluate(make(Attending(), objective="full", **{"data.documents": "separate"}))


PLAIN, STREAMS = {"objective": "full"}, {"objective": "truncated", "model.streams": 2}
TOLD, DENOISE = {"objective": "full", "model.step_embedding": "add"}, {"objective": "denoise"}


@pytest.mark.parametrize("flags", [PLAIN, STREAMS, TOLD, DENOISE, PLAIN | {"model.state_init": "zero"}], ids=str)
def test_generation_refuses_a_core_that_forgets_the_rows_before(flags):
    prompt = tokens(2)[:, :4]
    with pytest.raises(UserError, match=r"^Attending mixes rows but does not find the earlier ones in rows\.cache"):
        generate(make(Attending(), **flags), prompt, depth=2, num_tokens=3)
    for core in (Remembering(), RowByRow()):
        assert generate(make(core, **flags), prompt, depth=2, num_tokens=3).shape == (2, 3)


def test_a_core_that_forgets_the_rows_before_is_trained_and_evaluated_without_samples(tmp_path):
    """Positive control: one that keeps them is, with samples."""
    (text := tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    own = PLAIN | {"data.path": str(text), "data.cache_dir": str(tmp_path / "tokens"), "data.vocab_size": 270,
                   "data.heldout": 0.3, "training.budget": 2, "training.budget_unit": "steps",
                   "training.sample_every": 1, "evaluation.num_sequences": 2, "evaluation.sample_length": 2}
    for name, says in (("Tight", "no samples: Tight mixes rows"), ("Kept", None)):
        config = load_config(None, SMALL | own | {"model.core": f"{__name__}.{name}"})
        with pytest.warns(UserWarning, match=says) if says else nullcontext():
            run = load_run(train(config, tmp_path / name).run_dir)
            found = evaluate_run(run.objective, run.data, config, [2], Options())
        assert bool(found.samples) == (says is None)
        assert [row.metric for row in found.rows if row.metric == "nats_per_token"] == ["nats_per_token"]


@pytest.mark.parametrize("flags", [{"model.core_runs": 2}, {"model.latent_updates": 2}], ids=str)
def test_a_core_that_a_step_runs_several_times_needs_its_caches_as_well(flags):
    for name, refused in (("Tight", True), ("Kept", False)):
        own = PLAIN | {"model.core": f"{__name__}.{name}"} | flags
        rule = build_objective(config := load_config(None, SMALL | own), build(config, V), END)
        if refused:
            with pytest.raises(UserError, match=r"^Tight mixes rows"):
                generate(rule, tokens(2)[:, :4], depth=2, num_tokens=3)
        else:
            generate(rule, tokens(2)[:, :4], depth=2, num_tokens=3)


def test_one_of_several_blocks_that_forgets_is_named():
    config = load_config(None, SMALL | PLAIN | {"blocks.num": 2})
    rule = build_objective(config, build(config, V), END)
    rule.model.recurrence.core = Core(Remembering(), Attending())
    with pytest.raises(UserError, match=r"^Attending mixes rows"):
        generate(rule, tokens(2)[:, :4], depth=2, num_tokens=3)


def test_transformers_goes_on_from_a_cache_only_if_the_core_does():
    text, padding = tokens(2)[:, :4], Padding(None, 4)
    for core, refused in ((Attending(), True), (Remembering(), False)):
        reader, cache = LoopReader(make(core, **PLAIN), 0), Cache()
        whole = reader.logits(Reading(text, 2, padding), 0)
        first = reader.logits(Reading(text[:, :3], 2, padding, cache=cache), 0)
        torch.testing.assert_close(first, whole[:, :3])
        last = Reading(text[:, 3:], 2, padding, first=3, cache=cache)
        if refused:
            with pytest.raises(UserError, match=r"^Attending mixes rows .* or pass use_cache=False$"):
                reader.logits(last, 0)
        else:
            torch.testing.assert_close(reader.logits(last, 0), whole[:, 3:])


def test_what_a_core_with_a_cache_writes_is_what_the_whole_text_implies():
    rule = make(Remembering(), **PLAIN, **{"model.state_init": "zero"})
    text = tokens(2)[:, :4]
    written = generate(rule, text, depth=2, num_tokens=4, temperature=0)
    for _ in range(4):
        text = torch.cat([text, rule.model(text, 2)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, text[:, 4:])


def test_nothing_is_refused_under_full_attention():
    evaluate(make(Attending(Full()), objective="masked"))


def test_a_leak_that_training_opened_is_seen():
    core = Attending(Full(), share=0.0)
    objective = make(core, objective="full")
    evaluate(objective)
    core.share.data.fill_(0.1)
    with pytest.raises(UserError, match="lets row"):
        evaluate(objective)


@pytest.mark.parametrize(("mask", "row", "seen"), [
    (Causal(), 2, [2, 3, 4, 5]), (Full(), 2, [0, 1, 2, 3, 4, 5]),
    (Packed(torch.tensor([[0, 0, 0, 1, 1, 1]])), 1, [1, 2]),
    (Table(torch.eye(6, dtype=torch.bool).roll(1, 0)), 3, [0, 1, 2, 3, 4, 5]),  # from row to row, all around
    (Table(torch.eye(6, dtype=torch.bool)), 3, [3])])
def test_a_row_reaches_others_through_several_layers(mask, row, seen):
    assert reached(mask, row, 1, 6)[0].nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("rule", ["full", "denoise"])
@pytest.mark.parametrize("leak", [True, False])
def test_the_probes_say_that_a_model_reads_later_tokens(rule, leak, monkeypatch):
    config = load_config(None, SMALL | {"objective": rule})
    objective = build_objective(config, build(config, V)).eval()
    encode = objective.model.encode
    if leak:
        monkeypatch.setattr(objective.model, "encode", lambda x, *rows: encode(x) + encode(x).mean(1, keepdim=True))
    found = probe(objective, tokens(), {1: torch.zeros(4), 2: torch.zeros(4)}, vocab_size=V)
    assert any("it reads later tokens" in sentence for sentence in found.sentences) is leak
    change, = (row.mean for row in found.rows if row.metric == "later_tokens_change")
    assert (change > 0.05) if leak else (change < 1e-5)


def test_tokens_of_one_block_are_not_probed():
    config = load_config(None, SMALL | {"objective": "denoise", "denoise.context": "concat", "denoise.block_size": L})
    assert later_tokens(build_objective(config, build(config, V)), tokens(), 1) == []
