"""`objective auto` is the measured choice for the kind of data, and gives way to what is set beside it."""

import pytest

from looped.cli import main
from looped.config import Config, dump_config, load_config
from looped.config.arms import parse_arms
from looped.config.data_kinds import PUZZLES, TEXT
from looped.config.images import ImageConfig
from looped.config.recurrence import RecurrenceConfig
from looped.errors import UserError

AUTO, SUDOKU = {"objective": "auto"}, {"task.name": "sudoku", "task.options": {"size": 4}}


@pytest.fixture
def deep(tmp_path):
    """A file that names a depth, and a rule that reads it."""
    (path := tmp_path / "deep.yaml").write_text("objective: truncated\nrecurrence: {mean: 4, backprop: 2}\n")
    return path


@pytest.mark.parametrize(("kind", "given"), [(TEXT, {}), (PUZZLES, SUDOKU)], ids=["text", "tasks"])
def test_it_stands_for_the_settings_of_the_kind(kind, given):
    config = load_config(None, AUTO | given)
    assert config == load_config(None, dict(kind.auto) | given)
    assert config.kind.name == kind.name
    assert load_config(None, {}).replace(**AUTO, **given) == config


@pytest.mark.parametrize(("kind", "names"), [
    (TEXT, ["stdlib-late-loop"]),
    (PUZZLES, ["sums-denoise", "sudoku4-denoise", "sudoku6-denoise", "sudoku9-denoise", "maze-denoise"]),
], ids=["text", "tasks"])
def test_the_shipped_configs_of_these_rules_have_its_settings(kind, names):
    for name in names:
        config = load_config(name)
        assert {setting: config.value(setting) for setting in kind.auto} == dict(kind.auto)


def test_what_is_set_beside_it_stays():
    assert load_config(None, AUTO | {"recurrence.mean": 3}).recurrence.mean == 3
    config = load_config(None, AUTO | SUDOKU | {"denoise.noise.sigma_max": 20.0})
    assert (config.denoise.noise.sigma_min, config.denoise.noise.sigma_max) == (0.3, 20.0)


def test_a_flag_overrides_the_file_and_a_file_its_own_auto(deep, tmp_path):
    config = load_config(deep, AUTO)
    assert (config.objective, config.recurrence.mean, config.recurrence.backprop) == ("full", 2, 2)
    (path := tmp_path / "auto.yaml").write_text("objective: auto\nrecurrence: {mean: 5}\n")
    config = load_config(path)
    assert (config.objective, config.recurrence.mean, config.recurrence.from_share) == ("full", 5, 0.5)


def test_in_python_the_given_sections_stay():
    config = Config(objective="auto", recurrence=RecurrenceConfig(mean=3))
    assert (config.objective, config.recurrence.mean, config.recurrence.from_share) == ("full", 3, 0.5)


def test_a_dump_names_the_rule(tmp_path):
    config = load_config(None, AUTO | SUDOKU)
    (path := tmp_path / "config.yaml").write_text(text := dump_config(config))
    assert "objective: denoise" in text
    assert load_config(path) == config


def test_an_arm_can_be_auto():
    auto, three = parse_arms(load_config("smoke"), "auto,three=auto recurrence.mean=3")
    assert (auto.config.objective, auto.config.recurrence.mean, auto.name) == ("full", 2, "auto")
    assert (three.config.objective, three.config.recurrence.mean, three.name) == ("full", 3, "three")


@pytest.mark.parametrize("given", [{"images.source": "digits"}, {"images.source": "digits", "images.goal": "generate"}])
def test_where_nothing_was_measured_best_it_says_so(given, capsys):
    with pytest.raises(UserError, match="objective auto stands for no rule on images"):
        load_config(None, AUTO | given)
    assert main(["train", "smoke", "--objective", "auto", "--dry-run",
                 *(word for name, value in given.items() for word in (f"--{name}", value))]) == 2
    assert "stands for no rule" in capsys.readouterr().err
    with pytest.raises(ValueError, match="stands for no rule"):
        Config(objective="auto", images=ImageConfig(**{name.partition(".")[2]: value for name, value in given.items()}))


