"""Configs that come with the package, by name; what can be set, section by section; and both in the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from looped.cli import main
from looped.config import describe_settings, load_config
from looped.config.shipped import shipped, summary
from looped.errors import UserError

ROOT = Path(__file__).parents[2]


def shown(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", shipped("configs"))
def test_a_config_is_read_by_its_name_as_by_its_path(name):
    path = ROOT / "configs" / f"{name}.yaml"
    assert load_config(name) == load_config(path)
    assert summary(path).endswith(".")
    assert len(summary(path)) > 30


def test_a_file_of_the_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").write_text("seed: 7\n")
    assert load_config("smoke").seed == 7


def test_a_name_that_is_none_says_which_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no shipped config has this name; did you mean 'smoke'"):
        load_config("smok")
    with pytest.raises(UserError, match=r"cannot read config smok\.yaml: No such file"):
        load_config("smok.yaml")


def test_configs_are_listed_printed_and_copied(tmp_path, capsys):
    listed = shown(capsys, "configs")
    assert all(name in listed for name in shipped("configs"))
    text = (ROOT / "configs/smoke.yaml").read_text()
    assert shown(capsys, "configs", "smoke") == text
    shown(capsys, "configs", "smoke", "--out", str(tmp_path / "mine.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == text
    assert main(["configs", "smoke", "--out", str(tmp_path / "mine.yaml")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["configs", "--out", str(tmp_path / "other.yaml")]) == 2


def test_settings_are_listed_by_section_and_found_by_a_word(capsys):
    whole = "".join(shown(capsys, "settings", section) for section in sorted(
        {name.split(".")[0] for name, *_ in describe_settings()}))
    assert all(f"--{name} [" in whole for name, *_ in describe_settings())
    assert "--model.width [128]" in shown(capsys, "settings", "model.width")
    assert "--model.rope_base" in shown(capsys, "settings", "--search", "ROTARY")
    assert "--denoise.noise.sigma_min" not in shown(capsys, "settings", "denoise", "--search", "bridge")
    overview = shown(capsys, "settings")
    assert "denoise.noise" in overview
    assert "--" not in overview
    for arguments, why in ((["modle"], "did you mean 'model'"), (["--search", "xyzzy"], "no setting has 'xyzzy'")):
        assert main(["settings", *arguments]) == 2
        assert why in capsys.readouterr().err


def test_the_wheel_holds_configs_suites_and_tasks(tmp_path):
    source = tmp_path / "source"  # a build leaves folders in its source
    for name in ("looped", "tasks", "configs", "suites"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "suites"):
        assert {f"looped/{folder}/{path.name}" for path in (ROOT / folder).glob("*.yaml")} <= names
    assert {"looped/tasks/sudoku.py", "looped/py.typed"} <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "looped").rglob("*.py")}
    assert modules <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
