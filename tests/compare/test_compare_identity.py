"""A resumed comparison uses the text that it began with, or reports that the text has changed."""

import shutil

import yaml

from looped.cli import main
from looped.training.checkpoint import list_checkpoints


def test_a_comparison_does_not_go_on_with_a_text_that_has_changed(tiny_yaml, tmp_path, in_place, capsys):
    config = yaml.safe_load(tiny_yaml.read_text())
    shutil.copytree(config["data"]["path"], tmp_path / "text")
    config["data"] |= {"path": str(tmp_path / "text"), "cache_dir": str(tmp_path / "tokens")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    command = ["compare", str(tmp_path / "tiny.yaml"), "--objectives", "ar", "--budget", "tokens", "--amount", "200",
               "--out", str(tmp_path / "out"), "--seeds"]
    with in_place():
        assert main([*command, "1"]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "measured on" in page
    assert "cpu, fp32" in page
    (tmp_path / "text" / "more.txt").write_text("quite another text, " * 300)
    assert main([*command, "1"]) == 0  # the control: there is nothing left to train or to measure
    capsys.readouterr()
    assert main([*command, "2"]) == 2
    said = capsys.readouterr().err
    assert "have changed since it was trained on them" in said
    assert "documents 8 then, 9 now" in said
    assert "choose another --out" in said
    assert not list_checkpoints(tmp_path / "out" / "ar-1")
    assert main([*command, "1", "--evaluation.num_sequences", "3"]) == 2  # to be measured anew
    assert "have changed since it was trained on them" in capsys.readouterr().err
