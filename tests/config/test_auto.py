"""`objective: auto`: what it stands for by kind of data, and which settings give way to which."""

import pytest
import yaml

from looped.config import dump_config, load_config
from looped.config.arms import parse_arms
from looped.config.data_kinds import KINDS
from looped.config.unread_settings import unread
from looped.errors import UserError

TEXT = KINDS["text"].auto


def at(config, names):
    return {name: config.value(name) for name in names}


def test_text_gets_a_loop_of_two_that_begins_late_and_the_config_holds_it():
    with pytest.warns(UserWarning, match="objective auto for text: objective full, recurrence.mean 2, recurrence.from"):
        config = load_config(None, {"objective": "auto"})
    assert at(config, TEXT) == TEXT
    assert "auto" not in yaml.safe_load(dump_config(config))["objective"]
    assert load_config(None, yaml.safe_load(dump_config(config))) == config
    assert not unread(config, TEXT)


def test_puzzles_get_the_denoiser_of_the_shipped_config():
    shipped = load_config("sudoku4-denoise")
    with pytest.warns(UserWarning, match="objective auto for a task: objective denoise"):
        config = load_config(None, {"objective": "auto", "task.name": "sudoku"})
    auto = KINDS["puzzles"].auto
    assert at(config, auto) == at(shipped, auto) == auto
    assert not unread(config, auto)


@pytest.mark.filterwarnings("ignore:objective auto")
def test_a_flag_replaces_what_the_file_says_and_gives_way_to_other_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("objective: truncated\nrecurrence: {mean: 8, backprop: 3}\nmodel: {width: 64}\n", encoding="utf-8")
    config = load_config(path, {"objective": "auto", "recurrence.from_share": 0.25})
    assert (config.objective, config.recurrence.mean, config.recurrence.from_share) == ("full", 2, 0.25)
    assert (config.recurrence.backprop, config.model.width, config.model.state_init) == (3, 64, "zero")


@pytest.mark.filterwarnings("ignore:objective auto")
def test_in_a_file_it_gives_way_to_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("objective: auto\nrecurrence: {mean: 3}\nmodel: {width: 64}\n", encoding="utf-8")
    config = load_config(path, {"seed": 1})
    assert (config.objective, config.recurrence.mean, config.recurrence.from_share) == ("full", 3, 0.5)
    assert (config.model.width, config.model.state_init, config.seed) == (64, "zero", 1)


@pytest.mark.filterwarnings("ignore:objective auto")
def test_it_is_an_arm_of_a_comparison():
    ar, auto = parse_arms(load_config("stdlib-truncated"), "ar,auto recurrence.mean=3")
    assert (ar.config.objective, auto.config.objective, auto.name) == ("ar", "full", "auto recurrence.mean=3")
    assert (auto.config.recurrence.mean, auto.config.recurrence.from_share) == (3, 0.5)


def test_a_kind_of_data_without_a_measured_choice_is_refused():
    with pytest.raises(UserError, match="objective auto has no measured choice for images, only for text"):
        load_config(None, {"objective": "auto", "images.source": "digits"})
