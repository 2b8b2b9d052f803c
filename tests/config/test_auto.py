"""`objective auto` is the measured choice for the kind of data, and never replaces a setting without a word."""

import re

import pytest

from looped.cli import main
from looped.config import Config, dump_config, load_config
from looped.config.arms import parse_arms
from looped.config.data_kinds import PUZZLES, TEXT
from looped.errors import UserError

AUTO, SUDOKU = {"objective": "auto"}, {"task.name": "sudoku", "task.options": {"size": 4}}


@pytest.fixture
def file(tmp_path):
    """`file(text)`: the path of a config with this text."""
    def write(text):
        (path := tmp_path / "config.yaml").write_text(text)
        return path

    return write


@pytest.mark.parametrize(("kind", "given"), [(TEXT, {}), (PUZZLES, SUDOKU)], ids=["text", "tasks"])
def test_it_stands_for_the_settings_of_the_kind(kind, given):
    config = load_config(None, AUTO | given)
    assert config == load_config(None, dict(kind.auto) | given)
    assert config.kind.name == kind.name


@pytest.mark.parametrize(("kind", "names"), [
    (TEXT, ["stdlib-late-loop"]),
    (PUZZLES, ["sums-denoise", "sudoku4-denoise", "sudoku6-denoise", "sudoku9-denoise", "maze-denoise"]),
], ids=["text", "tasks"])
def test_the_shipped_configs_of_these_rules_have_its_settings(kind, names):
    for name in names:
        config = load_config(name)
        assert {setting: config.value(setting) for setting in kind.auto} == dict(kind.auto)


@pytest.mark.parametrize("noise", [{"denoise.noise.sigma_max": "20"}, {"denoise.noise": "{sigma_max: 20}"}])
def test_flags_beside_it_win(noise):
    assert load_config(None, AUTO | {"recurrence.mean": "3"}).recurrence.mean == 3
    found = load_config(None, AUTO | SUDOKU | noise).denoise.noise
    assert (found.sigma_min, found.sigma_max, found.share_at_max) == (0.3, 20.0, 1.0)


def test_a_preset_and_a_setting_of_it_beside_it_stay_as_they_are_without_it():
    flags = {"denoise.noise": "paper", "denoise.noise.sigma_max": "20"}
    plain = load_config(None, flags).denoise.noise
    assert plain.sigma_max == 20.0
    assert load_config(None, AUTO | flags | SUDOKU).denoise.noise == plain


def test_in_a_file_the_settings_beside_it_win(file):
    config = load_config(file("objective: auto\nrecurrence: {mean: 5}\n"))
    assert (config.objective, config.recurrence.mean, config.recurrence.from_share) == ("full", 5, 0.3)
    config = load_config(file("objective: auto\ndenoise: {noise: {sigma_max: 20}}\n"), SUDOKU)
    assert (config.denoise.noise.sigma_min, config.denoise.noise.sigma_max) == (0.3, 20.0)
    assert load_config(file("objective: auto\n"), {"objective": "ar"}).objective == "ar"


@pytest.mark.parametrize(("text", "given", "named", "out"), [
    ("recurrence: {mean: 4}", {}, "recurrence.mean 4", {"recurrence.mean": "4"}),
    ("denoise: {noise: paper}", SUDOKU, "denoise.noise paper", {"denoise.noise": "paper"}),
])
def test_as_a_flag_it_does_not_replace_what_a_file_sets_without_a_word(file, text, given, named, out):
    path = file(text)
    with pytest.raises(UserError, match=f"stands for .*, and .* sets {re.escape(named)}; add --"):
        load_config(path, AUTO | given)
    assert load_config(path, AUTO | given | {"recurrence.mean": 2, "denoise.noise": {}}).recurrence.mean == 2
    kept = load_config(path, AUTO | given | out)
    assert kept.objective != "auto"


def test_a_file_with_the_same_values_agrees_with_it(file):
    assert load_config(file("recurrence: {mean: 2, from_share: 0.3}"), AUTO).recurrence.from_share == 0.3


def test_a_dump_names_the_rule(file):
    config = load_config(None, AUTO | SUDOKU)
    assert "objective: denoise" in (text := dump_config(config))
    assert load_config(file(text)) == config


@pytest.mark.parametrize(("given", "said"), [
    ({"images.source": "digits"}, "not available for images"),
    ({"images.source": "digits", "images.goal": "generate"}, "not available for images"),
    ({"blocks.num": "2"}, "blocks.num is 2"),
    ({"task.name": "sudoku", "task.layout": "causal"}, "objective auto (objective denoise, .*: .*order confidence"),
    ({"recurrence.stages": "[{until: 0.3, mean: 1}]"}, "objective auto (objective full, .*: .*from_share 0.3"),
])
def test_where_it_does_not_fit_one_sentence_says_so(given, said, capsys, file):
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert main(["train", str(file("seed: 1")), "--objective", "auto", "--dry-run", *words]) == 2
    assert re.search(said.replace("(", r"\("), error := capsys.readouterr().err), error
    assert "Traceback" not in error


@pytest.mark.parametrize("use", [
    lambda path: Config(objective="auto"),
    lambda path: Config().replace(**AUTO),
    lambda path: parse_arms(Config(), "ar,auto"),
    lambda path: load_config(path, auto=False),
])
def test_elsewhere_the_rule_is_to_be_named(use, file):
    with pytest.raises(ValueError, match="here name the rule"):
        use(file("objective: auto"))


@pytest.mark.parametrize(("before", "after"), [
    (["compare"], ["--objectives", "ar,full", "--budget", "tokens", "--amount", "1000"]), (["bench", "step"], [])])
def test_a_comparison_does_not_begin_from_it(before, after, file, capsys):
    assert main([*before, str(file("objective: auto")), *after]) == 2
    assert "here name the rule" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["info"], ["train", "--dry-run"]])
def test_a_flag_replaces_it_where_a_file_has_it_for_images(words, file, capsys):
    path = file("{objective: auto, images: {source: digits}}")
    assert main([words[0], str(path), *words[1:]]) == 2
    assert "not available for images" in capsys.readouterr().err
    assert main([words[0], str(path), *words[1:], "--objective", "full"]) == 0


def test_a_misspelt_one_is_recognised():
    with pytest.raises(UserError, match="auto"):
        load_config(None, {"objective": "atuo"})


def test_a_broken_preset_of_noise_in_a_file_is_one_sentence(file):
    with pytest.raises(UserError, match="unknown noise preset 'papr'"):
        load_config(file("denoise: {noise: papr}"), {"denoise.noise.sigma_min": "1"})
