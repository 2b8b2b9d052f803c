"""Diversity is counted right, a matching temperature is found or said to be out of reach, and a writer that is as good
as its twin comes out level with it at any temperature of its own."""

import math

import pytest
import torch

from looped.config import load_config
from looped.errors import UserError
from looped.evaluation import sample_quality
from looped.evaluation.judge import Judge
from looped.evaluation.sample_quality import (
    Reference,
    distinct,
    diversity,
    jackknife,
    leave_one_out,
    match_distinct,
    matched_quality,
    repetition,
    write_texts,
)
from looped.models.build import build
from looped.objectives import build_objective

V = 30


def make(objective="ar", sharp=6.0, seed=0):
    config = load_config(None, {"objective": objective, "model.width": 16, "model.num_heads": 2, "seed": seed,
                                "denoise.target.dim": 6, "denoise.cond_width": 8, "model.state_init": "zero"})
    made = build_objective(config, build(config, V)).eval()
    made.model.embed.weight.data.mul_(sharp)
    return made


def prompts(num=48):
    return torch.randint(V, (num, 3), generator=torch.Generator().manual_seed(0))


def drawn(num=20, length=10, kinds=8):
    return torch.randint(kinds, (num, length), generator=torch.Generator().manual_seed(1)).tolist()


def test_distinct_counts_different_ngrams():
    assert distinct([[1, 2, 1, 2]], 1) == 0.5
    assert distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[1, 2], [1, 2]], 2) == 0.5
    assert distinct([[1]], 2) == 0.0


def test_repetition_is_counted_within_a_text():
    texts = [[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 1], [1, 2]]
    assert repetition(texts, 4).tolist() == pytest.approx([0.2, 0, 0.5, 0])
    assert repetition([texts[1], texts[1]], 4).tolist() == [0, 0]  # distinct-4 would be a half


@pytest.mark.parametrize("n", [1, 2, 4])
def test_leaving_one_out_in_one_pass_is_leaving_one_out(n):
    texts = [*drawn(), [3, 3, 3], [1], []]
    slow = [distinct(texts[:i] + texts[i + 1 :], n) for i in range(len(texts))]
    assert leave_one_out(texts, n).tolist() == pytest.approx(slow)
    assert leave_one_out([[1, 2, 3, 4, 5]], n).tolist() == [0]


def test_the_jackknife_is_the_interval_of_a_mean_where_texts_share_nothing():
    """Texts that hold one new word and one that all share: distinct-1 is a mean over texts but for the shared word."""
    texts = [[i + 10, 0] if i % 2 else [i + 10, i + 1000] for i in range(100)]
    share = torch.tensor([0.5 if i % 2 else 1.0 for i in range(100)])
    assert jackknife(texts, 1) == pytest.approx(1.96 * share.std().item() / 10, rel=0.03)
    assert math.isnan(jackknife([[1, 2]], 1))


def test_diversity_rows_are_all_there():
    rows = diversity(torch.tensor(drawn()), depth=3)
    assert [row.metric for row in rows] == ["distinct_1", "distinct_2", "distinct_4", "repetition_4"]
    assert all(row.ci_low <= row.mean <= row.ci_high and row.depth == 3 and row.n == 20 for row in rows)


def test_many_prompts_are_written_in_parts_and_the_parts_do_not_show(monkeypatch):
    objective = make("denoise").double()
    whole = write_texts(objective, prompts(7), 2, num_tokens=5)
    monkeypatch.setattr(sample_quality, "BATCH", 3)
    assert torch.equal(write_texts(objective, prompts(7), 2, num_tokens=5), whole)


def writer(diversity_at, num=60, length=30):
    """Texts of random words out of more, the higher the temperature."""
    calls = []

    def write(temperature):
        calls.append(temperature)
        random = torch.Generator().manual_seed(2)
        return (torch.rand(num, length, generator=random) ** 1.5 * diversity_at(temperature)).long()

    write.calls = calls
    return write


@pytest.mark.parametrize("target", [0.6, 0.75, 0.9, 1.0, 1.3, 1.9])
def test_the_temperature_of_a_diversity_is_found_in_a_few_tries(target):
    write = writer(lambda t: 8 + 40 * t**2)
    reference = distinct(write(target).tolist(), 2)
    write.calls.clear()
    found = match_distinct(write, reference)
    assert found.reached
    assert abs(found.distinct - reference) <= 0.005
    assert found.temperature == pytest.approx(target, abs=0.05)
    assert distinct(found.texts.tolist(), 2) == found.distinct
    assert len(write.calls) <= 7
    assert len(set(write.calls)) == len(write.calls)


@pytest.mark.parametrize("reference", [0.55, 0.6, 0.65])
def test_a_diversity_that_jumps_a_little_with_the_temperature_is_found_all_the_same(reference):
    smooth = writer(lambda t: 8 + 40 * t**2)
    jumpy = writer(lambda t: (8 + 40 * t**2) * (1 + 0.03 * math.sin(1e5 * t)))
    assert match_distinct(jumpy, reference).reached
    assert len(jumpy.calls) <= 12
    assert distinct(smooth(1.0).tolist(), 2) < 0.65  # the references lie on both sides


@pytest.mark.parametrize(("reference", "end"), [(0.999, 2.0), (0.001, 0.5)])
def test_a_diversity_out_of_reach_is_said_to_be(reference, end):
    found = match_distinct(writer(lambda t: 8 + 40 * t**2), reference)
    assert not found.reached
    assert found.temperature == end


def test_a_writer_that_temperature_does_not_move_ends_the_search():
    write = writer(lambda t: 20)
    assert not match_distinct(write, 0.9).reached
    assert len(write.calls) <= 12


@pytest.fixture(scope="module")
def judge():
    return Judge("judge", make(), 1, "vocabulary")


def beside_twin(writer, twin, judge, rows, texts, num_tokens):
    against = Reference("twin", twin, 1)
    return matched_quality(writer, against, judge, rows, texts, {"num_tokens": num_tokens, "seed": 0})


def test_a_writer_is_level_with_itself(judge):
    writer, rows = make(), prompts()
    found = beside_twin(writer, writer, judge, rows, {1: None}, 12)
    figures = {row.metric: row for row in found.rows}
    assert figures["judged_behind_twin"].mean == figures["matched_behind_twin"].mean == 0
    assert figures["matched_perplexity_percent"].mean == 0
    assert figures["matched_behind_twin"].temperature == 1
    assert figures["matched_distinct_2"].mean == figures["twin_distinct_2"].mean
    assert figures["matched_nats"].mean == figures["twin_judged_nats"].mean
    about = {row.metric: (row.by, row.twin) for row in found.rows}
    assert about.pop("twin_distinct_2") == about.pop("matched_distinct_2") == (None, "twin")
    assert set(about.values()) == {("judge", "twin")}  # another twin's or judge's do not replace them
    assert len(found.per_example["matched_behind_twin"][1]) == len(rows)


def test_a_colder_writer_looks_better_until_diversity_is_matched(judge):
    """Positive control: a copy of the twin with sharper logits is cheaper to the judge, and just as good."""
    twin, colder, rows = make(), make(), prompts(200)
    decode = colder.model.decode
    colder.model.decode = lambda *args, **kw: decode(*args, **kw) / 0.8
    found = {row.metric: row for row in beside_twin(colder, twin, judge, rows, {1: None}, 12).rows}
    assert found["judged_behind_twin"].ci_high < -0.1
    assert found["judged_perplexity_percent"].mean < -10
    matched = found["matched_behind_twin"]
    assert matched.temperature == pytest.approx(1.25, abs=0.05)
    assert matched.mean == pytest.approx(0, abs=0.05)
    assert found["matched_perplexity_percent"].mean == pytest.approx(100 * math.expm1(matched.mean))


def test_a_worse_writer_stays_behind_at_equal_diversity(judge):
    found = {row.metric: row for row in beside_twin(make(seed=5), make(), judge, prompts(100), {1: None}, 12).rows}
    assert found["matched_behind_twin"].ci_low > 0.5


def test_texts_at_hand_are_not_written_again(judge, monkeypatch):
    objective, rows = make("denoise"), prompts(8)
    texts = {2: write_texts(objective, rows, 2, num_tokens=6)}
    plain = beside_twin(objective, make(), judge, rows, {2: None}, 6)
    calls, write = [], sample_quality.write_texts

    def watched(*args, **kw):
        calls.append(kw.get("temperature"))
        return write(*args, **kw)

    monkeypatch.setattr(sample_quality, "write_texts", watched)
    again = beside_twin(objective, make(), judge, rows, texts, 6)
    assert again.rows == plain.rows
    assert calls.count(1.0) == 0
    assert calls.count(None) == 1  # the twin's


def test_one_token_has_no_diversity_to_match(judge):
    with pytest.raises(UserError, match="sample_length"):
        beside_twin(make(), make(), judge, prompts(2), {1: None}, 1)
