"""The values of flags and files: no text is cut, and no setting is dropped for a second one of the same name."""

import pytest
import yaml

from looped.cli import split_settings
from looped.config import load_config, parse_flag
from looped.config.files import load_yaml
from looped.errors import UserError


@pytest.mark.parametrize("text", ["notes #1.txt", "*.md", "[12].txt", "[12]", "a: b", "{x}.txt", "%.txt", "&a", "12",
                                  "1e3", "2026-01-02", "null", "true", "#1", "a,b", "sub dir", "@x", "a\nb: [c"])
def test_the_name_of_a_file_is_taken_as_it_is(text):
    assert load_config(None, {"data.path": text}).data.path == (text,)
    assert load_config(None, {"data.mixture.web.path": text}).data.mixture["web"].path == (text,)


def test_a_list_of_files_is_a_list():
    assert load_config(None, {"data.path": "[a, 'b #1.txt', \"[1].txt\"]"}).data.path == ("a", "b #1.txt", "[1].txt")
    assert load_config(None, {"data.path": "'a'"}).data.path == ("a",)  # as earlier versions asked for quotes


@pytest.mark.parametrize(("name", "text", "value"), [
    ("data.dataset", "null", None), ("data.dataset", "12", "12"), ("data.dataset", "#1", "#1"),
    ("data.split", "null", "null"),
    ("data.split", "train[:10%]", "train[:10%]"), ("data.vocab_size", "512", 512), ("seed", "3", 3),
    ("data.streaming", "true", True), ("data.streaming", "endless", "endless"),
    ("objective", "full # mine", "full # mine"),
    ("optim.betas", "[0.9, 0.95]", [0.9, 0.95]), ("task.options", "{size: 6}", {"size": 6}),
    ("task.options.size", "6", 6), ("denoise.noise", "paper", "paper"), ("no.such", "1", 1)])
def test_other_values_are_those_of_yaml_where_the_setting_takes_them(name, text, value):
    assert parse_flag(name, text) == value


@pytest.mark.parametrize(("text", "says"), [
    ("model: {width: 32}\nseed: 1\nmodel: {num_heads: 2}\n", r"is not YAML \(line 3\): 'model' is set a second time"),
    ("data:\n  length: 32\n  length: 64\n", r"\(line 3\): 'length' is set a second time; keep one"),
    ("data: {mixture: {a: {path: x}, a: {path: y}}}", "'a' is set a second time")])
def test_a_key_that_a_file_has_twice_is_refused(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        load_config(tmp_path / "c.yaml")


def test_keys_of_a_merged_mapping_may_be_overridden(tmp_path):
    (tmp_path / "c.yaml").write_text("data: &d {length: 32}\nimages: {}\nmodel: {width: 32}\n", encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").data.length == 32
    (tmp_path / "c.yaml").write_text("task: {options: &o {size: 4}}\ndomain: {options: {<<: *o, size: 6}}\n",
                                     encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").domain.options == {"size": 6}


def test_a_mapping_that_is_merged_by_two_others_is_read_as_yaml_reads_it():
    text = "base: &b {x: 1, z: 3}\ntop: {deep: {a: &a {<<: *b, x: 2}}}\nlast: {<<: *a, y: 2}\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("flags", [{"denoise.noise.sigma_max": "8", "denoise.noise": "paper"},
                                   {"denoise.noise": "paper", "denoise.noise.sigma_max": "8"}], ids=str)
def test_a_setting_holds_before_and_after_its_section(flags):
    assert load_config(None, flags).denoise.noise.sigma_max == 8
    assert load_config(None, {"optim.lr": "0.5", "optim": "{warmup_steps: 3}"}).optim.lr == 0.5


def test_a_flag_that_is_given_twice_is_refused():
    with pytest.raises(UserError, match=r"--data.path is given twice; keep one, and write several values as one list"):
        split_settings(["c.yaml", "--data.path", "a", "--data.path=b"])
    with pytest.raises(UserError, match=r"--num_evals is given twice"):
        split_settings(["c.yaml", "--num-evals", "1", "--num_evals=2"])
    with pytest.raises(UserError, match=r"--data.mixture '.*' is not a YAML value; 'a' is set a second time; keep one"):
        load_config(None, {"data.mixture": "{a: {path: x}, a: {path: y}}"})


@pytest.mark.parametrize(("text", "says"), [
    ("1: 2\n", "c.yaml has the key 1, which is no name"), ("on: 2\n", "has the key True, .*YAML reads on, off"),
    ("model: {1: 2}\n", "model.1: keys should be strings"), ("'1': 2", "unknown setting '1'")])
def test_a_key_that_is_no_text_is_named(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("betas", ["[1.0, 0.95]", "[0.9, 1]", "[-0.1, 0.95]"])
def test_a_moment_that_never_decays_is_refused(betas):
    with pytest.raises(UserError, match=r"optim.betas.\d: input should be (less|greater) than"):
        load_config(None, {"optim.betas": betas})
    assert load_config(None, {"optim.betas": "[0.0, 0.999]"}).optim.betas == (0.0, 0.999)
