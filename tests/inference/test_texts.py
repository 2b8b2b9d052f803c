"""A text ends where it says so, is counted as long as it is, and short texts do not tilt a mean."""

import pytest
import torch

from looped.config import load_config
from looped.data.tokenizer import train_tokenizer
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_samples
from looped.evaluation.judge import Judge, judged_rows
from looped.evaluation.sample_quality import diversity
from looped.inference.generate import generate
from looped.inference.sequence_batch import NOTHING, Ending, as_lists, lengths_of, per_token
from looped.models.build import build
from looped.objectives import build_objective

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V, END = 20, 3
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8,
         "model.state_init": "zero", "data.length": 12, "evaluation.prompt_length": 4, "masked.cond_width": 8}
RULES = {"ar": {"objective": "ar"}, "truncated": {"objective": "truncated"},
         **{name: {"objective": "denoise", "denoise.context": name} for name in ("inject", "concat", "context")},
         "blocks of 2": {"objective": "denoise", "denoise.block_size": 2}, "masked": {"objective": "masked"}}


def make(flags, end=END):
    config = load_config(None, SMALL | flags)
    return build_objective(config, build(config, V), end)


def prompts(num=12):
    return torch.randint(V, (num, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", RULES)
def test_a_text_ends_with_its_end_of_text(name):
    """It is the text that is written past the end, up to there."""
    objective = make(RULES[name])
    texts = generate(objective, prompts(), num_tokens=30, depth=2)
    beyond = generate(objective, prompts(), num_tokens=30, depth=2, past_the_end=True)
    assert (beyond != NOTHING).all()
    assert texts.shape == beyond.shape
    for row, whole in zip(as_lists(texts), beyond.tolist(), strict=True):
        assert row == whole[: whole.index(END) + 1 if END in whole else 30]
    assert lengths_of(texts).min() < 30  # positive control: some do end
    assert lengths_of(texts).tolist() == [len(row) for row in as_lists(texts)]


def test_a_row_of_generated_tokens_is_decoded_as_it_is():
    """With -1 after the end of its text, as a tensor, a list or an array."""
    tokenizer = train_tokenizer(["import os"], 257)
    row = torch.tensor([*tokenizer.encode("import"), tokenizer.end_of_text, NOTHING, NOTHING])
    assert [tokenizer.decode(each) for each in (row, row.tolist(), row.numpy())] == ["import"] * 3


@pytest.mark.parametrize("prompt", ["import", ["import", "os"], None, [1, 2], torch.tensor([1, 2])])
def test_a_prompt_that_is_no_batch_of_tokens_is_refused_in_a_sentence(prompt):
    with pytest.raises(UserError, match=r"a prompt is a tensor of token ids.*run.tokenizer.encode\(text\)"):
        generate(make(RULES["ar"]), prompt, num_tokens=2, depth=1)


def test_no_step_is_taken_when_all_texts_are_over(monkeypatch):
    objective, calls = make(RULES["ar"]), []
    encode = objective.model.encode
    monkeypatch.setattr(objective.model, "encode", lambda *args, **kw: calls.append(1) or encode(*args, **kw))
    texts = generate(objective, prompts(), num_tokens=200, depth=1)
    assert len(calls) == lengths_of(texts).max() < 200


def test_without_an_end_of_text_nothing_ends():
    assert (generate(make(RULES["ar"], end=None), prompts(), num_tokens=30, depth=1) != NOTHING).all()


def decode(ids):
    return "".join(chr(97 + token) for token in ids)


def test_a_text_stops_at_the_token_that_completes_a_stop_string():
    objective = make(RULES["ar"], end=None)
    free = generate(objective, prompts(40), num_tokens=40, depth=1)
    stop = decode(free[0, 5:7].tolist())
    texts = generate(objective, prompts(40), num_tokens=40, depth=1, stop=[stop, "never said"], decode=decode)
    for row, whole in zip(as_lists(texts), free.tolist(), strict=True):
        said = decode(whole)
        assert decode(row) == (said[: said.index(stop) + 2] if stop in said else said)
    assert lengths_of(texts)[0] <= 7
    ending = Ending(stop=[stop], decode=decode)
    assert ending.without_stop(f"before{stop}after") == "before"
    assert ending.without_stop("none") == "none"


def test_the_cut_is_at_the_first_token_that_completes_it():
    ending = Ending(end_of_text=END, stop=["bc"], decode=decode)
    assert as_lists(ending.cut(torch.tensor([[0, 1, 2, 1, 2], [0, END, 1, 2, 0], [1, 1, 1, 1, 1]]))) == [
        [0, 1, 2], [0, END], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("request_", "said"), [
    ({"depth": 0}, "depth 0 is not"), ({"depth": -1}, "depth -1"), ({"num_tokens": 0}, "num_tokens 0"),
    ({"depth": 1.5}, "depth 1.5"), ({"stop": [""], "decode": decode}, "stop"),
    ({"stop": "word", "decode": decode}, "stop"), ({"stop": ["word"]}, "pass decode=")])
def test_a_request_out_of_range_is_one_sentence(request_, said, unchecked):
    with pytest.raises(UserError, match=said):
        generate(make(RULES["ar"]), prompts(), **{"num_tokens": 3, "depth": 1} | request_)


@pytest.mark.parametrize("prompt", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 3), torch.tensor([[1, 2, V]]),
                                    torch.tensor([[-1, 2]]), torch.zeros(1, 3, dtype=torch.int32)],
                         ids=["1-D", "floats", "too large", "negative", "int32"])
def test_a_prompt_that_is_none_is_one_sentence(prompt, unchecked):
    with pytest.raises(UserError, match="prompt"):
        generate(make(RULES["ar"]), prompt, num_tokens=3, depth=1)


def test_a_failed_request_leaves_the_mode_as_it_was(monkeypatch):
    objective = make(RULES["ar"]).train()
    monkeypatch.setattr(objective.model, "unroll", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(objective, prompts(), num_tokens=2, depth=1)
    assert objective.training


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-30, 1e-8])
def test_a_temperature_that_overflows_means_the_likeliest_token(temperature):
    objective = make(RULES["ar"])
    texts = generate(objective, prompts(), num_tokens=5, depth=1, temperature=temperature)
    assert torch.equal(texts, generate(objective, prompts(), num_tokens=5, depth=1, temperature=0.0))


def test_what_is_counted_is_what_was_written():
    objective = make(RULES["ar"])
    rows, texts = evaluate_samples(objective, prompts(), [1], num_tokens=30)
    figures = {row.metric: row for row in rows}
    assert figures["text_tokens"].mean == lengths_of(texts[1]).double().mean().item() < 30
    whole = texts[1].masked_fill(texts[1] == NOTHING, END)  # positive control: fillers taken for tokens
    assert figures["distinct_1"].mean > diversity(whole)[0].mean


def test_the_mean_by_token_is_that_of_all_tokens():
    sums, counts = torch.tensor([10.0, 1.0, 4.0]), torch.tensor([10, 4, 2])
    values = per_token(sums, counts)
    assert values.mean().item() == pytest.approx(15 / 16)
    equal = per_token(sums, torch.tensor([5, 5, 5]))
    torch.testing.assert_close(equal, (sums / 5).double())
    many = torch.randint(1, 20, (4000,), generator=torch.Generator().manual_seed(0))
    noisy = many + torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * many.sqrt()
    picks = torch.randint(4000, (500, 4000), generator=torch.Generator().manual_seed(2))
    spread = (noisy[picks].sum(1) / many[picks].sum(1)).std().item()  # the bootstrap of the ratio itself
    assert per_token(noisy, many).std().item() / 4000**0.5 == pytest.approx(spread, rel=0.1)


@torch.no_grad()
def test_a_judge_reads_no_further_than_the_end():
    judge, texts = Judge("judge", make(RULES["ar"]).eval(), 1, "v"), torch.randint(4, V, (3, 6))
    texts[0, 2:], texts[1, 5:] = NOTHING, NOTHING
    found = judge.read(prompts(3), texts)
    assert found.counts.tolist() == [2, 5, 6]
    logits = judge.objective.model(torch.cat([prompts(3)[:1], texts[:1, :2]], dim=1), 1)[:, 3:5].log_softmax(-1)
    alone = -logits.gather(-1, texts[:1, :2].unsqueeze(-1)).sum()
    assert found.nats[0].item() == pytest.approx(alone.item(), rel=1e-5)
    rows = judged_rows(judge, prompts(3), texts, decode)
    assert rows[0].mean == pytest.approx((found.nats.sum() / 13).item())
    assert rows[1].mean == pytest.approx((found.nats.sum() / 13 / 0.6931471805599453).item())  # one byte per token
