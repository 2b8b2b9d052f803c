"""Documents that share a sequence: kept apart, each is read as it would be alone, under every rule; packed, none is."""

from dataclasses import replace

import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_depth
from looped.evaluation.likelihood import (
    losses_by_depth,
    losses_by_solver,
    main_losses,
    next_token_losses,
)
from looped.evaluation.probes import probe
from looped.inference.generate import generate
from looped.inference.text_denoising import TeacherForced
from looped.models.build import build
from looped.models.language import LanguageModel
from looped.nn.rows import PLAIN
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.objectives.masked import Masked
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V, END, CUT = 30, 0, 5
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8, "data.length": 12,
         "evaluation.prompt_length": 4, "model.state_init": "zero", "masked.cond_width": 8,
         "denoise.noise.share_at_max": 0.0}
LOOPS = {rule: {"objective": rule} for rule in ("full", "truncated", "progressive", "one-step", "fixed-point", "ar")}
DENOISERS = {name: {"objective": "denoise", "denoise.context": name} for name in ("inject", "concat", "context")}
BLOCKWISE = {"objective": "blockwise", "blocks.num": 2}
BLOCKS = {f"{name}, blockwise": flags | BLOCKWISE for name, flags in DENOISERS.items()}
MASKED = {"masked": {"objective": "masked"}, "masked, blocks": {"objective": "masked", "blocks.num": 2}}
RULES = LOOPS | DENOISERS | BLOCKS | MASKED
PAIRS = {f"{name}, blocks of 2": DENOISERS[name] | {"denoise.block_size": 2} for name in ("concat", "context")}
ALL = RULES | PAIRS


def make(flags, documents="separate"):
    config = load_config(None, SMALL | flags | {"data.documents": documents})
    objective = build_objective(config, build(config, V), END).double().eval()
    with torch.no_grad():  # a zero-initialised modulation would hide a path
        for name, parameter in objective.named_parameters():
            if "modulation" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    return objective


def tokens(first=0):
    """Two sequences of 13 tokens; row CUT of each is the end of its first document. `first` changes what is before."""
    rows = torch.randint(1, V, (2, 13), generator=torch.Generator().manual_seed(0))
    rows[:, :CUT] = (rows[:, :CUT] + first - 1) % (V - 1) + 1
    rows[:, CUT] = END
    return rows


def readings(objective, rows, *, sigma=2.0):
    """Logits of every target: of a loop after three steps, of a denoiser and masked diffusion at one level."""
    batch = objective.ask(rows)
    if isinstance(objective, Masked):
        shown = batch.targets.clone()
        shown[:, 1::2] = objective.model.mask_token
        return objective.logits(shown, torch.full((2,), 0.4, dtype=torch.float64), rows_of_batch(batch))
    if hasattr(objective, "denoiser"):
        target = objective.denoiser.target(batch.targets).double()
        eps = torch.randn(2, 12, target.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        z = target + sigma * eps[:, -target.shape[1] :]
        return objective.logits(batch, z, torch.full((2,), sigma, dtype=torch.float64))
    rows = rows_of_batch(batch)
    e = objective.model.encode(batch.inputs, rows)
    return objective.model.decode(objective.model.unroll(e, rows, grad=3), rows)


@torch.no_grad()
@pytest.mark.parametrize("name", RULES)
def test_a_document_is_read_as_it_would_be_alone(name):
    rows = tokens()
    if name.startswith("masked"):  # which hides by place: an even number of rows is left out
        rows = torch.cat([rows[:, :1], rows], dim=1)[:, :13]
    at = int((rows[0] == END).nonzero())
    apart, packed = make(RULES[name]), make(RULES[name], "packed")
    together, alone = readings(apart, rows), readings(apart, rows[:, at:])
    torch.testing.assert_close(together[:, at:], alone, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(readings(packed, rows)[:, at:], alone, atol=1e-3)  # positive control


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_what_is_measured_of_a_document_does_not_move_with_the_one_before(name):
    moved = {documents: figures(make(ALL[name], documents), tokens(7)) - figures(
        make(ALL[name], documents), tokens()) for documents in ("separate", "packed")}
    assert moved["separate"].abs().max() < 1e-5
    assert moved["packed"].abs().max() > 1e-4


def figures(objective, rows):
    """The loss of the second document under all that `looped eval` measures by token; of masked diffusion, whose bound
    is one of whole texts, its logits."""
    if isinstance(objective, Masked):
        return readings(objective, rows)[:, CUT:]
    sought = objective.ask(rows).sought
    found = [next_token_losses(objective, rows, 3) * sought]
    if hasattr(objective, "denoiser") and objective.denoiser.edges is None:
        found.append(TeacherForced(objective, rows).log_probs(2, StepRandom(0, 0, count=2), "t") * sought)
    return torch.stack(found)[..., CUT:]


@pytest.mark.parametrize("name", [name for name in ALL if name not in MASKED])
@pytest.mark.parametrize("documents", ["separate", "packed"])
def test_no_gradient_of_a_document_reaches_the_one_before(name, documents, monkeypatch):
    objective = make(ALL[name], documents).train()
    batch, encoded, encode = objective.ask(tokens()), [], LanguageModel.encode
    second = batch.sought & (torch.arange(12) >= CUT)

    def watched(model, *args, **kw):
        encoded.append(encode(model, *args, **kw))
        encoded[-1].retain_grad()
        return encoded[-1]

    monkeypatch.setattr(LanguageModel, "encode", watched)
    objective(replace(batch, scored=second), StepRandom(0, 0, count=2)).value.backward()
    reached = max(e.grad[:, :CUT].abs().max().item() for e in encoded if e.grad is not None)
    assert (reached == 0) == (documents == "separate")


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_prompt_is_read_from_its_last_end_of_text_on(name):
    objective = make(ALL[name])
    prompt = tokens()[:, : CUT + 3]
    parts = (prompt, prompt[:, CUT:], *([prompt[:, CUT + 1 :]] if name in MASKED else []))
    whole, *cut = (generate(objective, part, num_tokens=4, depth=2) for part in parts)
    assert all(torch.equal(whole, each) for each in cut)
    packed = make(ALL[name], "packed")
    for parameter in (p for name, p in packed.named_parameters() if name.endswith("embed.weight")):
        parameter.mul_(6)  # or its texts would hardly depend on what is seen
    changed = [generate(packed, tokens(first)[:, : CUT + 3].repeat(32, 1), num_tokens=4, depth=2, past_the_end=True)
               for first in (0, 7)]
    assert not torch.equal(*changed)  # positive control: packed, what stands before the end is read


def test_positions_begin_anew_and_the_row_of_an_end_belongs_to_what_follows():
    batch = Batch.of_documents(torch.tensor([[4, END, 5, 6, END, END, 7]]), END)
    assert batch.inputs.tolist() == [[4, END, 5, 6, END, END]]
    assert batch.documents.tolist() == [[0, 1, 1, 1, 2, 3]]
    assert batch.positions[..., 0].tolist() == [[0, 0, 1, 2, 0, 0]]
    assert batch.targets.tolist() == [[END, 5, 6, END, END, 7]]


@pytest.mark.parametrize("name", RULES)
def test_every_evaluation_runs_on_documents_kept_apart(name):
    objective = make(RULES[name]).float()
    assert all(losses.losses.isfinite().all() for losses in losses_by_depth(objective, tokens(), [1, 2]))
    assert main_losses(objective, tokens(), 2).isfinite().all()
    if name in DENOISERS:
        assert losses_by_solver(objective, tokens(), [2], num_trajectories=1)[0].losses.isfinite().all()
    if not name.startswith("masked"):
        losses = {depth: next_token_losses(objective, tokens(), depth).mean(1) for depth in (1, 2)}
        assert probe(objective, tokens(), losses, vocab_size=V).rows


def test_packed_text_is_what_it_was():
    objective = make({"objective": "ar"}, "packed")
    assert objective.ask(tokens()).documents is None
    assert rows_of_batch(objective.ask(tokens())) is PLAIN


@pytest.mark.parametrize("name", PAIRS)
def test_of_a_block_in_which_a_document_ends_the_next_one_is_not_sought(name):
    batch = make(PAIRS[name]).ask(tokens())
    assert batch.sought.tolist() == [[row != CUT for row in range(12)]] * 2  # blocks of rows 4 and 5, 6 and 7, ...


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
def test_masked_text_is_written_as_it_was_trained_the_first_token_of_a_document_at_position_0(name, monkeypatch):
    """No row of a document sees the end of the one before: in training that stands in another document."""
    objective, seen = make(MASKED[name]), []

    def logits(tokens, m, rows):
        seen.append(rows)
        return torch.zeros(*tokens.shape, V)

    monkeypatch.setattr(objective, "logits", logits)
    generate(objective, tokens()[:, : CUT + 3], num_tokens=4, depth=1)
    places, mask = torch.arange(CUT + 7), seen[0].mask
    assert (places + seen[0].start.view(2, 1))[:, CUT + 1].tolist() == [0, 0]
    sees = mask.allow(places[None, :, None], places[None, None, :], torch.arange(2)[:, None, None])
    assert sees[0, CUT + 1].tolist() == [False] * (CUT + 1) + [True] * 6
    assert generate(objective, tokens()[:, : CUT + 1], num_tokens=4, depth=1).shape == (2, 4)  # nothing is left to see


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_tokens_without_a_figure_weigh_nothing_and_are_told(name):
    objective, rows = make(PAIRS[name]), tokens()
    rows[1, ::3], rows[1, 0] = END, 1
    sought = objective.ask(rows).sought
    assert sought.sum(1).tolist() != [sought[0].sum()] * 2
    (found,) = losses_by_depth(objective, rows, [2])
    each = next_token_losses(objective, rows, 2)
    assert found.share == sought.double().mean()
    assert found.losses.mean().item() == pytest.approx((each * sought).sum().item() / sought.sum().item())
    with pytest.warns(UserWarning, match="of the held-out tokens are not scored"):
        sweep = evaluate_depth(objective.float(), rows, [2], bytes_per_token=3.0)
    assert not [row for row in sweep.rows if row.metric == "bits_per_byte"]


def test_what_follows_a_document_kept_apart_is_not_written():
    with pytest.raises(UserError, match="past_the_end continues with another document"):
        generate(make({"objective": "ar"}), tokens(), num_tokens=4, depth=1, past_the_end=True)


def test_documents_kept_apart_need_their_ends():
    config = load_config(None, SMALL | {"data.documents": "separate", "objective": "ar"})
    with pytest.raises(UserError, match="pass end_of_text="):
        build_objective(config, build(config, V))
