"""Removed settings: read where they say what is done anyhow, refused in a sentence where they ask for what is gone."""

import pytest
import yaml

from looped.cli import main
from looped.config import dump_config, load_config
from looped.config.removed import REMOVED, REMOVED_VALUES
from looped.errors import UserError


def test_a_run_of_before_is_read(tmp_path):
    config = load_config(None, {"model.width": 64})
    values = yaml.safe_load(dump_config(config))
    for name, (usual, _) in REMOVED.items():
        *sections, key = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[key] = usual
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("name", "value"), [*((name, 0.5) for name in REMOVED), *REMOVED_VALUES])
def test_what_became_of_a_setting_is_said(name, value, tmp_path, capsys):
    with pytest.raises(UserError, match=f"{name} {value} was removed: "):
        load_config(None, {name: value})
    (tmp_path / "empty.yaml").write_text("seed: 0")
    assert main(["train", str(tmp_path / "empty.yaml"), f"--{name}", str(value)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
