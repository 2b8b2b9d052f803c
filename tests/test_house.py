"""The house as a whole: cheap to import, every public name there, settings that explain themselves."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from browsers import find_browser
from jaxtyping import TypeCheckError
from jaxtyping import config as checks

import looped
from looped.config import Config, describe_settings, dump_config, load_config
from looped.errors import UserError
from looped.evaluation.intervals import confidence_interval


def test_import_loads_no_torch():
    code = "import sys, looped, looped.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def undefined_names(*paths):
    """`file:line name` of names that are defined nowhere. Ruff takes the words of jaxtyping's shapes for names as well,
    and so the lint leaves them out; here all names within a string are."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", *paths]
    found = []
    for each in json.loads(subprocess.run(ruff, capture_output=True, text=True, check=False).stdout):
        line, column = each["location"]["row"], each["location"]["column"] - 1
        spans = [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
                 for node in ast.walk(ast.parse(Path(each["filename"]).read_text()))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        if not any(start <= (line, column) < end for start, end in spans):
            found.append(f"{each['filename']}:{line} {each['message']}")
    return found


def test_every_name_in_the_code_is_defined(tmp_path):
    (tmp_path / "wrong.py").write_text('def f(x: Float[Tensor, "batch"]):\n    return nowhere(x)\n')
    assert len(undefined_names(str(tmp_path))) == 3  # Float, Tensor and nowhere, not batch
    root = Path(__file__).parents[1]
    assert undefined_names(*(str(root / part) for part in ("looped", "tasks", "tests", "scripts"))) == []


@pytest.mark.parametrize("name", [name for name in looped.__all__ if name != "__version__"])
def test_every_public_name_exists(name):
    assert getattr(looped, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = looped.no_such_name


def test_a_config_survives_yaml():
    config = load_config(None, {"model.width": "256", "denoise.noise": "paper", "denoise.noise.sigma_max": "40"})
    assert config.denoise.noise.log_mean == -1.2
    assert config.denoise.noise.sigma_max == 40
    assert load_config(None, yaml.safe_load(dump_config(config))) == config


def test_flags_override_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {width: 64}\nseed: 3\n")
    config = load_config(tmp_path / "c.yaml", {"seed": "4"})
    assert (config.model.width, config.seed) == (64, 4)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\n")
    assert load_config(tmp_path / "c.yaml").seed == 3
    (tmp_path / "c.yaml").write_bytes("seed: 3".encode("utf-16"))
    with pytest.raises(UserError, match=r"c.yaml is not YAML: 'utf-8' codec"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(("flags", "why"), [
    ({"model.widht": "3"}, "did you mean 'width'"),
    ({"model.width": "100", "model.num_heads": "8"}, "try 96 or 112"),
    ({"model.width": "x"}, "model.width.*valid integer"),
    ({"denoise.noise": "papre"}, "did you mean 'paper'"),
    ({"denoise.noise.sigma_mx": "3"}, "did you mean 'sigma_max'"),
    ({"denoise.noise.sigma_min": "30"}, "not below sigma_max"),
    ({"objective": "denois"}, "objective"),
    ({"data.path": "a", "data.dataset": "b"}, "keep one"),
])
def test_a_bad_setting_is_named_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00", "model: 3", "42"])
def test_a_broken_file_is_named_in_one_sentence(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "broken.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_browser_a_page_test_is_skipped_by_name_and_on_ci_it_fails(monkeypatch):
    monkeypatch.setattr("shutil.which", {"google-chrome": "/usr/bin/google-chrome"}.get)
    assert find_browser() == "/usr/bin/google-chrome"
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser on this machine"):
        find_browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser on this machine"):
        find_browser()


def test_every_setting_is_described_once():
    names = [name for name, _, _ in describe_settings()]
    assert len(names) == len(set(names))
    assert all(description for _, _, description in describe_settings())
    assert {name.split(".")[0] for name in names} == set(Config.model_fields)


def test_a_wrong_rank_is_noticed_in_the_first_calls_of_a_test():
    assert confidence_interval(torch.ones(3)) == (1, 1)
    with pytest.raises(TypeCheckError, match="confidence_interval"):
        confidence_interval(torch.ones(3, 5))
    for _ in range(type(checks).LIMIT):
        confidence_interval(torch.ones(3))
    with pytest.raises(RuntimeError, match="must match self tensor shape"):  # torch's own
        confidence_interval(torch.ones(3, 5))


def test_a_wheel_holds_every_package():
    """The list of pyproject.toml is that of the folders; one that is missing is missed only outside of a checkout."""
    import tomllib

    listed = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(file.parent).replace("/", ".") for file in Path("looped").rglob("__init__.py")}
    assert set(listed) == found | {"looped.tasks", "looped.configs", "looped.suites"}


def test_no_two_modules_of_tests_have_one_name():
    """pytest imports them by their last name, and collects the second of two not at all."""
    names = [path.name for path in Path("tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
