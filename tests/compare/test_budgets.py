"""Arms at equal budgets: values are interpolated linearly between evaluations, and no cell is blank."""

import math
from pathlib import Path

import pytest

from looped.compare.curve import crossing, value_at
from looped.compare.matched_compute import LATER, amount, at_equal, equal_note, equal_table, spent_by_all
from looped.compare.plan import make_plan
from looped.compare.table_cells import closing_notes
from looped.compare.text_measure import NEXT_TOKEN
from looped.compare.text_summary import summarise_texts
from looped.config import load_config


def line(step, loss):
    return {"step": step, "next_token": loss, "seconds": step / 2, "tokens": 10 * step, "layer_forwards": 100 * step}


CURVE = [line(2, 5.0), line(4, 4.0), line(8, 3.0)]


def test_a_value_lies_on_the_straight_line_between_two_evaluations():
    assert value_at(CURVE, "tokens", 30, NEXT_TOKEN) == 4.5
    assert value_at(CURVE, "tokens", 40, NEXT_TOKEN) == 4.0
    assert value_at(CURVE, "layer_forwards", 500, NEXT_TOKEN) == 3.75
    assert value_at(CURVE, "seconds", 1, NEXT_TOKEN) == 5.0


def test_nothing_is_known_before_the_first_evaluation_and_the_end_of_training_stays():
    assert value_at(CURVE, "tokens", 10, NEXT_TOKEN) is None
    assert value_at(CURVE, "tokens", 1000, NEXT_TOKEN) == 3.0
    assert value_at([line(3, 5.0)], "tokens", 30, NEXT_TOKEN) == 5.0


def test_the_first_evaluation_stands_for_a_fraction_that_it_misses_by_a_step():
    assert value_at(CURVE, "tokens", 11, NEXT_TOKEN) == value_at(CURVE, "tokens", 20, NEXT_TOKEN) == 5.0


@pytest.mark.parametrize("wanted", [4.75, 4.0, 3.125])
def test_what_was_spent_at_a_crossing_gives_the_figure_back(wanted):
    point = crossing(CURVE, wanted, NEXT_TOKEN)
    assert all(value_at(CURVE, unit, point[unit], NEXT_TOKEN) == wanted for unit in ("seconds", "tokens"))


@pytest.fixture
def arms(made_up):
    """The same seconds for both arms, of which one has done ten times the steps: 40 against 4."""
    quick = [made_up("denoise", seed, [3.0], [(10, 5.0 + seed), (40, 2.0 + seed)], seconds_a_step=0.1)
             for seed in range(2)]
    slow = [made_up("full", seed, [3.0], [(1, 6.0), (4, 3.0 + seed)]) for seed in range(2)]
    return summarise_texts([*quick, *slow])


def test_budgets_are_the_most_that_every_run_of_every_arm_has_spent(arms, made_up):
    assert spent_by_all(arms) == {"seconds": 4, "tokens": 40, "layer_forwards": 400}
    early = summarise_texts([made_up("ar", 0, [3.0], [(1, 5.0), (2, 4.0)])])
    assert spent_by_all([*arms, *early]) == {"seconds": 2, "tokens": 20, "layer_forwards": 200}


def test_the_table_is_what_the_straight_lines_give_by_hand(arms):
    table = equal_table(arms)
    header, lines = table.header, table.lines
    assert header == ["arm", "after 4 seconds", "after 40 tokens", "after 400 layer forwards"]
    assert lines == [["denoise", "2.500 ± 0.707", LATER, LATER], ["full", *["3.500 ± 0.707"] * 3]]
    third = at_equal(arms)[3].as_dict()
    assert third == {"arm": "full", "budget": "seconds", "spent": 4, "mean": 3.5, "sd": pytest.approx(0.5**0.5),
                     "num": 2}


def test_seeds_that_were_measured_later_are_counted_in_the_cell(made_up):
    runs = [made_up("ar", 0, [3.0], [(1, 5.0), (3, 3.0)]), made_up("ar", 1, [3.0], [(3, 4.0), (6, 3.0)]),
            made_up("denoise", 0, [3.0], [(1, 9.0), (2, 8.0)])]
    arms = summarise_texts(runs)
    assert equal_table(arms).lines[0][1:] == [f"4.000 (1 of 2 seeds, the others {LATER})"] * 3
    rows = [each.as_dict() for each in at_equal(arms)]
    assert (rows[0]["num"], rows[0]["mean"]) == (1, 4)
    assert math.isnan(rows[0]["sd"])  # which the report leaves out of its rows


@pytest.mark.parametrize(("spent", "shown"), [(60.02, "60"), (2.314, "2.31"), (128, "128"), (1234567.0, "1,234,567")])
def test_amounts_read_well(spent, shown):
    assert amount(spent) == shown


def test_the_note_says_what_is_shown(arms):
    plan = make_plan(load_config(None), "denoise,full", budget=("tokens", 5), num_seeds=2, depths=None,
                     out=Path("out"))
    said = equal_note(arms, plan)
    assert "Held-out loss as a next-token predictor (lower is better)" in said
    assert "over 2 seeds" in said
    assert f"{LATER}: no evaluation by then" in said


def test_the_note_explains_only_cells_that_are_shown(made_up):
    plan = make_plan(load_config(None), "ar,full", budget=("tokens", 5), num_seeds=1, depths=None, out=Path("out"))
    arms = summarise_texts([made_up(arm, 0, [3.0], [(1, 5.0), (2, 4.0)]) for arm in ("ar", "full")])
    assert LATER not in equal_note(arms, plan)


@pytest.mark.parametrize(("clock", "said"), [("processor", True), ("wall", False)])
def test_the_clock_of_the_seconds_is_named_where_it_is_not_the_walls(tmp_path, clock, said):
    config = load_config(None, {"training.clock": clock})
    plan = make_plan(config, "ar,full", budget=("seconds", 5), num_seeds=1, depths=[1], out=tmp_path)
    assert any("training.clock" in note for note in closing_notes([], plan)) is said
