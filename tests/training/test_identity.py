"""A run keeps what it was trained on: its tokenizer reads every text, and other data under its name are refused."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from looped.cli import main
from looped.config import load_config
from looped.data.eval_text import heldout_text
from looped.data.from_config import open_data
from looped.data.token_windows import TokenStream
from looped.errors import UserError
from looped.training.checkpoint import list_checkpoints
from looped.training.heldout import heldout_own
from looped.training.merge import merge
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

AR = {"objective": "ar", "training.budget": 3, "training.checkpoint_every": 0, "evaluation.num_samples": 1,
      "evaluation.sample_length": 2, "model.state_init": "zero"}


@pytest.fixture
def folder(tmp_path, text_folder):
    return shutil.copytree(text_folder, tmp_path / "text")


@pytest.fixture
def config(tiny, folder, tmp_path):
    return lambda **changes: tiny(**AR | {"data.path": [str(folder)],
                                          "data.cache_dir": str(tmp_path / "tokens")} | changes)


def change(folder):
    (folder / "more.txt").write_text("quite another text, " * 300)


def loss_of(run):
    return heldout_own(run.objective, run.data, run.config)["loss"]


# ---- a text that has changed


def test_a_changed_text_is_refused_with_what_changed_and_the_way_out(config, folder, tmp_path, capsys):
    train(config(), tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--depths", "1"]) == 0  # the control: the text is as it was
    capsys.readouterr()
    change(folder)
    assert main(["eval", str(tmp_path / "run"), "--depths", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "have changed since it was trained" in said
    assert "documents 8 then, 9 now" in said
    assert "--other-data" in said


def test_a_run_of_before_there_was_a_data_json_is_refused_by_its_fingerprint(config, folder, tmp_path):
    train(config(), tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    stamp = json.loads((tmp_path / "run" / "stamp.json").read_text())
    del stamp["folder"]
    (tmp_path / "run" / "stamp.json").write_text(json.dumps(stamp))
    assert len(load_run(tmp_path / "run").data.heldout) > 0
    change(folder)
    with pytest.raises(UserError, match="have changed since it was trained on them"):
        _ = load_run(tmp_path / "run").data


def test_other_data_are_read_by_the_tokenizer_of_the_run(config, folder, tmp_path):
    train(config(), tmp_path / "run")
    own = load_run(tmp_path / "run").tokenizer
    change(folder)
    run = load_run(tmp_path / "run", other_data=True)
    assert run.data.tokenizer.json() == own.json()
    assert open_data(run.config).tokenizer.json() != own.json()  # the control: one trained anew is another
    text = "".join(run.tokenizer.decode(ids.tolist()) for ids in (run.data.train.tokens, run.data.heldout.tokens))
    assert "quite another text" in text
    assert str(folder) in run.measured_on


def test_a_text_of_fewer_tokens_than_the_vocabulary_of_the_run_does_no_harm(config, folder, tmp_path):
    train(config(**{"data.vocab_size": 400}), tmp_path / "run")
    for path in folder.iterdir():
        path.write_text("ab " * 40)
    run = load_run(tmp_path / "run", other_data=True)
    assert run.data.vocab_size == run.identity.vocab_size == 400
    assert torch.isfinite(torch.tensor(loss_of(run)))


def test_a_run_that_goes_on_refuses_a_changed_text_by_what_changed(config, folder, tmp_path):
    train(config(), tmp_path / "run")
    change(folder)
    with pytest.raises(UserError, match=r"documents 8 then, 9 now.*choose another --run"):
        train(config(), tmp_path / "run")


def test_a_start_that_saved_nothing_leaves_no_tokenizer_to_the_next(config, folder, tmp_path):
    """The text of a run without a checkpoint may change, as its config may; its tokenizer goes with it."""
    with pytest.raises(ZeroDivisionError):
        train(config(**{"training.eval_every": 1}), tmp_path / "run", evaluate=lambda *_: 1 / 0)
    assert not list_checkpoints(tmp_path / "run")
    change(folder)
    train(config(), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.tokenizer.json() == run.data.tokenizer.json() == open_data(run.config).tokenizer.json()
    assert run.identity.facts["documents"] == 9


# ---- data that were given in Python


def test_data_given_in_python_are_not_mistaken_for_those_of_the_config(config, tmp_path, capsys):
    data = open_data(config())
    for name, fingerprint in {"mine": "mine", "kept": data.fingerprint}.items():  # also where its name was kept
        mine = replace(data, train=data.heldout, heldout=data.train, source="mine", fingerprint=fingerprint)
        train(config(), tmp_path / name, data=mine)
        assert main(["eval", str(tmp_path / name)]) == 2
        assert "trained on data given in Python" in capsys.readouterr().err
        run = load_run(tmp_path / name, data=mine)
        assert run.data is mine
        assert run.measured_on is None


def test_data_made_of_others_are_known_by_their_own_tokens(config, tmp_path):
    """A copy with other streams does not keep the hash of the old ones."""
    data = open_data(config())
    train(config(), tmp_path / "run", data=data)
    other = TokenStream("train", data.train.tokens[::-1].copy(), end_of_text=data.train.end_of_text,
                        documents=data.train.documents)
    with pytest.raises(UserError, match="trained on data given in Python"):
        train(config(), tmp_path / "run", data=replace(data, train=other))
    assert load_run(tmp_path / "run", data=replace(data, train=other)).measured_on is not None
    assert load_run(tmp_path / "run", data=replace(data, source="mine")).measured_on is None  # the control: the same


def test_the_data_of_the_config_may_be_given_too(config, tmp_path):
    train(config(), tmp_path / "run", data=open_data(config()))
    assert load_run(tmp_path / "run").data.fingerprint == open_data(config()).fingerprint


def test_data_of_another_tokenizer_are_refused_where_they_are_given(config, tmp_path):
    train(config(), tmp_path / "run")
    run = load_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"another tokenizer.*heldout_text\(texts, run.tokenizer\)"):
        run.data = open_data(config(**{"data.vocab_size": 300}))
    with pytest.raises(UserError, match="texts is one string"):
        heldout_text("def f1(x):\n    return x * 1\n", run.tokenizer)
    run.data = heldout_text(["def f1(x):\n    return x * 1\n"], run.tokenizer)
    assert run.measured_on.startswith("text given in Python (")


# ---- where the data are


def test_relative_paths_start_where_training_was_started(config, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(config(**{"data.path": ["text"], "data.cache_dir": "tokens"}), "run")
    before = load_run("run").data.heldout.sequences(2, 8)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(load_run("../run").data.heldout.sequences(2, 8), before)
    assert not any((tmp_path / "elsewhere").iterdir())  # the cache was found too
    train(load_config("../run/config.yaml"), "../run")  # and training goes on, here with nothing left to do


def test_a_text_that_is_gone_is_found_in_the_cache_by_its_fingerprint(config, folder, tmp_path, capsys):
    train(config(), tmp_path / "run")
    before, ratio = load_run(tmp_path / "run").data.heldout.sequences(2, 8), load_run(tmp_path / "run").data
    shutil.rmtree(folder)
    found = load_run(tmp_path / "run").data
    assert torch.equal(found.heldout.sequences(2, 8), before)
    assert found.bytes_per_token == ratio.bytes_per_token
    assert "its tokens from the cache are used" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "tokens")
    with pytest.raises(UserError, match="does not exist"):
        _ = load_run(tmp_path / "run").data


def test_a_run_is_loaded_without_a_change_to_the_process(config, tmp_path):
    train(config(**{"training.threads": 1}), tmp_path / "run")
    torch.set_num_threads(2)
    load_run(tmp_path / "run")
    assert torch.get_num_threads() == 2


# ---- runs that are set beside each other


def test_a_warm_start_and_edges_from_other_data_must_be_meant(config, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    change(tmp_path / "other")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(open_data(config()).tokenizer.json())
    shared = {"data.tokenizer": str(tokenizer), "training.budget": 1}
    train(config(**shared, **{"data.path": [str(tmp_path / "other")]}), tmp_path / "first")
    settings = shared | {"training.warm_start": str(tmp_path / "first")}
    with pytest.raises(UserError, match=r"documents 9 there, 8 here.*training.other_data to true"):
        train(config(**settings), tmp_path / "second")
    train(config(**settings, **{"training.other_data": True}), tmp_path / "second")


def test_blocks_of_different_tokenizers_are_not_put_together(tiny, tmp_path):
    """As two versions of the library may train them on one text."""
    blocks = {"objective": "blockwise", "blocks.num": 2, "model.num_core_layers": 2, "blocks.shared": "frozen",
              "training.budget": 1}
    runs = [tmp_path / f"run{block}" for block in range(2)]
    for block, run in enumerate(runs):
        train(tiny(**blocks, **{"blocks.alone": block}), run)
    whole = merge(runs, tmp_path / "whole")
    assert json.loads((whole / "data.json").read_text()) == json.loads((runs[0] / "data.json").read_text())
    assert len(load_run(whole).data.heldout) > 0
    path = runs[1] / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "1.0", "added_tokens": [
        {"id": 0, "content": "<|endoftext|>", "single_word": True, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}]}))
    with pytest.raises(UserError, match="different tokenizers for the same text"):
        merge(runs, tmp_path / "again")


def test_the_folder_of_a_run_that_was_moved_falls_back_to_the_current_one(config, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(config(**{"data.path": ["text"]}), "run")
    moved = tmp_path / "machine"
    moved.mkdir()
    os.rename(tmp_path / "run", moved / "run")
    os.rename(folder, moved / "text")
    monkeypatch.chdir(moved)
    assert len(load_run("run").data.heldout) > 0


# ---- another text


def rows_of(folder):
    return [json.loads(line) for line in (folder / "eval" / "depth.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    """A finished run that no test changes."""
    run = tmp_path_factory.mktemp("shared") / "run"
    train(tiny(**AR), run)
    assert main(["eval", str(run), "--depths", "1"]) == 0
    return run


def test_any_text_can_be_measured_and_lies_beside_the_runs_own_figures(shared, tmp_path, capsys):
    text = "".join(f"def g{i}(y):\n    return y + {i}\n" for i in range(60))
    (tmp_path / "mine.jsonl").write_text(json.dumps({"body": text[:700]}) + "\n" + json.dumps({"body": text[700:]}))
    own = (shared / "eval" / "depth.jsonl").read_bytes()
    command = ["eval", str(shared), "--depths", "1", "--text", str(tmp_path / "mine.jsonl"), "--text-field", "body"]
    assert main(command) == 0
    assert "on " + str(tmp_path / "mine.jsonl") in capsys.readouterr().out
    assert (shared / "eval" / "depth.jsonl").read_bytes() == own
    folder, = (shared / "other").iterdir()
    assert folder.name.startswith("mine.jsonl-")
    assert (folder / "plots" / "depth.png").stat().st_size > 1000
    found = {row["metric"]: row for row in rows_of(folder)}
    assert all(row["data"].startswith(str(tmp_path / "mine.jsonl")) for row in rows_of(folder))
    assert not any("data" in row for row in rows_of(shared))
    # By hand: windows of the run's own tokens, their mean cross-entropy, and bytes counted in the file.
    run = load_run(shared)
    ids = [token for part in (text[:700], text[700:]) for token in [*run.tokenizer.encode(part),
                                                                  run.tokenizer.end_of_text]]
    count = (len(ids) - 1) // 8
    windows = torch.tensor([ids[start * 8 : start * 8 + 9] for start in [i * count // 4 for i in range(4)]])
    with torch.no_grad():
        logits = run.objective.model(windows[:, :-1], 1)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert found["nats_per_token"]["mean"] == pytest.approx(nats, rel=1e-5)
    bits = nats / 0.6931471805599453 * len(ids) / len(text.encode())
    assert found["bits_per_byte"]["mean"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(("flags", "why"), [
    (["--text", "nowhere.txt"], "--text nowhere.txt does not exist"), (["--text-field", "body"], "add --text"),
    (["--text", "empty.txt"], "holds no text"), (["--text", "short.txt"], "data.length 8 needs 9 tokens"),
    (["--text", "rows.jsonl"], "set --text-field to one of them")])
def test_a_text_that_cannot_be_measured_is_said(shared, tmp_path, monkeypatch, capsys, flags, why):
    for name, content in {"empty.txt": "", "short.txt": "ab", "rows.jsonl": '{"zzz": "ab"}'}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(shared), "--depths", "1", *flags]) == 2
    assert why in capsys.readouterr().err


def test_other_data_are_measured_where_they_are_meant(config, folder, tmp_path):
    train(config(), tmp_path / "run")
    change(folder)
    assert main(["eval", str(tmp_path / "run"), "--depths", "1", "--other-data"]) == 0
    where, = (tmp_path / "run" / "other").iterdir()
    assert all(str(folder) in row["data"] for row in rows_of(where))
    assert not (tmp_path / "run" / "eval").exists()


@pytest.fixture(scope="module")
def beside(tiny, text_folder, tmp_path_factory):
    """Runs of one tokenizer: two of the same text, `run` and `same`, and one of another, `else`."""
    here = tmp_path_factory.mktemp("beside")
    folder = shutil.copytree(text_folder, here / "text")
    shutil.copytree(folder, here / "other")
    change(here / "other")
    settings = AR | {"data.cache_dir": str(here / "tokens"), "data.path": [str(folder)]}
    (here / "tokenizer.json").write_text(open_data(tiny(**settings)).tokenizer.json())
    for name, where in {"run": folder, "same": folder, "else": here / "other"}.items():
        train(tiny(**settings | {"data.tokenizer": str(here / "tokenizer.json"), "data.path": [str(where)]}),
              here / name)
    return here


@pytest.mark.parametrize("flag", ["--twin", "--match", "--judge"])
def test_a_run_beside_it_must_know_the_same_data(beside, tmp_path, capsys, flag):
    """With the same tokenizer it would pass otherwise, though it may have learned what the run is measured on."""
    run = shutil.copytree(beside / "run", tmp_path / "run", symlinks=True)
    command = ["eval", str(run), "--depths", "1", *(["--judge", str(beside / "same")] * (flag == "--match")), flag]
    assert main([*command, str(beside / "same")]) == 0
    capsys.readouterr()
    assert main([*command, str(beside / "else")]) == 2
    said = capsys.readouterr().err
    assert f"{flag} {beside / 'else'} was trained on other data" in said
    assert "documents 8 here, 9 there" in said
    assert main([*command, str(beside / "else"), "--other-data"]) == 0


def test_every_row_says_the_device_and_the_number_format(shared, tmp_path, capsys):
    run = shutil.copytree(shared, tmp_path / "run", symlinks=True)
    figures = {}
    for dtype in ("fp32", "bf16", "fp16"):
        capsys.readouterr()
        assert main(["eval", str(run), "--depths", "1", "--device", "cpu", "--dtype", dtype]) == 0
        assert f"measured on cpu, {dtype}" in capsys.readouterr().out
        figures[dtype] = next(row["mean"] for row in rows_of(run) if row["metric"] == "nats_per_token" and
                              (row["device"], row["dtype"]) == ("cpu", dtype))
    assert {(row["dtype"], row.get("settings")) for row in rows_of(run)} == {
        ("fp32", None), ("bf16", "dtype=bf16"), ("fp16", "dtype=fp16")}
    assert figures["bf16"] != figures["fp32"]
    assert figures["bf16"] == pytest.approx(figures["fp32"], rel=0.02)
    assert figures["fp16"] == pytest.approx(figures["fp32"], rel=0.01)


def test_the_tokens_of_other_text_do_not_need_the_text_of_the_run(shared, tmp_path):
    run = shutil.copytree(shared, tmp_path / "run", symlinks=True)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(load_config(run / "config.yaml").data.path[0]), "/nowhere"))
    (tmp_path / "text.txt").write_text("def h(x):\n    return x\n" * 30)
    assert main(["eval", str(run), "--depths", "1", "--text", str(tmp_path / "text.txt")]) == 0
