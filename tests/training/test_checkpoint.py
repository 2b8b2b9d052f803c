"""Checkpoints: complete or absent, checked, never pickled; what damage, a full disk and a foreign config lead to."""

import ast
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import looped
from looped.config.training import OptimConfig
from looped.errors import UserError
from looped.training import checkpoint as ckpt
from looped.training.optim import build_optimizers


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, tokens):
        return self.head(self.layers[0](self.embed(tokens)))


def trained(seed=0, name="muon", steps=2):
    torch.manual_seed(seed)
    module = Tied()
    optimizers = build_optimizers(module, OptimConfig(name=name))
    for _ in range(steps):
        module(torch.arange(7)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return module, optimizers


def save(run_dir, step, seed=0, keep=3):
    module, optimizers = trained(seed)
    tensors = {"model": ckpt.module_tensors(module), "optimizer": ckpt.optimizer_tensors(optimizers)}
    return ckpt.save_checkpoint(run_dir, step, tensors, {"groups": ckpt.optimizer_groups(optimizers)}, keep)


def heard(run_dir):
    lines = []
    return ckpt.newest_good(run_dir, lines.append), lines


def test_no_pickle_anywhere_in_the_package():
    banned = {"pickle", "cPickle", "dill", "joblib", "shelve", "cloudpickle"}
    for file in Path(looped.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & banned, file
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, file


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_module_and_optimisers_come_back_bit_for_bit(tmp_path, name):
    module, optimizers = trained(0, name)
    tensors = {"model": ckpt.module_tensors(module), "optimizer": ckpt.optimizer_tensors(optimizers)}
    path = ckpt.save_checkpoint(tmp_path, 5, tensors, {}, keep=1)
    other, others = trained(1, name, steps=0)
    ckpt.load_module(other, ckpt.load_tensors(path, "model"), path)
    ckpt.load_optimizers(others, ckpt.load_tensors(path, "optimizer"), path)
    for model, optims in ((module, optimizers), (other, others)):
        model(torch.arange(7)).square().sum().backward()
        for optimizer in optims:
            optimizer.step()
    for (key, a), b in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert other.head.weight is other.embed.weight


def test_tied_tensors_are_written_once(tmp_path):
    names = set(load_file(save(tmp_path, 1) / "model.safetensors"))
    assert names == {"embed.weight", "layers.0.weight", "layers.0.bias", "empty", "seen"}


def test_the_newest_are_kept_and_latest_points_to_the_last(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == ["step-00000030", "step-00000020"]
    assert os.readlink(tmp_path / "latest") == "checkpoints/step-00000030"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_step_can_be_written_again(tmp_path):
    save(tmp_path, 10)
    path = save(tmp_path, 10, seed=1)
    assert ckpt.check(path)["step"] == 10
    assert torch.equal(load_file(path / "model.safetensors")["embed.weight"], trained(1)[0].embed.weight)


def truncate(file, dice):
    file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])


def flip(file, dice):
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def scramble(file, dice):
    file.write_bytes(dice.randbytes(dice.randrange(200)))


def remove(file, dice):
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, scramble, remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_seen_said_in_one_line_and_the_one_before_is_used(tmp_path, damage, name):
    good, bad = save(tmp_path / "whole", 10), save(tmp_path / "whole", 20)
    for trial in range(20):
        run = tmp_path / f"run{trial}"
        shutil.copytree(tmp_path / "whole", run, symlinks=True)
        damage(run / bad.relative_to(tmp_path / "whole") / name, random.Random(trial))
        (path, state), lines = heard(run)
        assert (path.name, state["step"]) == (good.name, 10)
        assert len(lines) == 1
        assert "damaged" in lines[0]
        assert "\n" not in lines[0]


def test_a_changed_number_in_the_state_is_damage(tmp_path):
    path = save(tmp_path, 20)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"step": 21}))
    with pytest.raises(ckpt.DamagedError, match="its own hash"):
        ckpt.check(path)


def test_none_whole_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert heard(tmp_path) == (None, [])
    remove(save(tmp_path, 10) / "state.json", None)
    with pytest.raises(UserError, match=r"state.json is missing, and no older one is intact"):
        heard(tmp_path)


def test_a_format_of_the_future_is_not_called_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "FORMAT", 3)
    save(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 3, this version of looped reads 1 and 2"):
        heard(tmp_path)


def test_damaged_ones_are_set_aside_so_that_pruning_keeps_the_good(tmp_path):
    save(tmp_path, 10)
    remove(save(tmp_path, 20) / "state.json", None)
    ckpt.set_aside(tmp_path, newer_than=10)
    save(tmp_path, 15, keep=1)
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == ["step-00000015"]
    assert (tmp_path / "checkpoints" / "damaged-step-00000020" / "model.safetensors").exists()


@pytest.mark.parametrize("broken", ["save_file", "sync", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(tmp_path, monkeypatch, broken):
    save(tmp_path, 10)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if broken == "rename" else ckpt, broken, full)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*No space left.*resume from step-00000010"):
        save(tmp_path, 20)
    monkeypatch.undo()
    assert heard(tmp_path)[0][1]["step"] == 10
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_real_write_limit_ends_in_one_sentence(tmp_path):
    """The kernel's own refusal (a file size limit), through the writer of safetensors."""
    import resource
    import signal

    module = nn.Linear(300, 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(UserError, match=r"cannot write checkpoint .*[Tt]oo large"):
            ckpt.save_checkpoint(tmp_path, 1, {"model": ckpt.module_tensors(module)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, usual)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_leftovers_of_killed_writers_go(tmp_path):
    save(tmp_path, 10)
    for name in (".tmp-step-00000020", ".tmp-old-step-00000005"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest").symlink_to("checkpoints/step-00000010")
    assert heard(tmp_path)[0][1]["step"] == 10  # they are not taken for checkpoints
    ckpt.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == [
        "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("layers.0.bias"), "no tensor 'layers.0.bias'"),
    (lambda t: t.update(extra=torch.zeros(1)), "a tensor 'extra' that the config's model does not have"),
    (lambda t: t.update(seen=torch.zeros(5).double()), r"'seen' has shape \(5,\), but the config gives \(3,\)"),
    (lambda t: t.update(seen=torch.zeros(3)), "'seen' has dtype torch.float32, but the config gives torch.float64"),
])
def test_a_foreign_checkpoint_is_refused_by_the_first_tensor_that_differs(tmp_path, change, message):
    module, _ = trained()
    tensors = dict(ckpt.module_tensors(module))
    change(tensors)
    before = module.embed.weight.detach().clone()
    with pytest.raises(UserError, match=message):
        ckpt.load_module(module, tensors, tmp_path)
    assert torch.equal(module.embed.weight, before)


def test_foreign_optimiser_state_is_refused(tmp_path):
    _, optimizers = trained()
    for name, tensor in (("nobody.exp_avg", torch.zeros(3)), ("embed.weight.exp_avg", torch.zeros(9, 4))):
        with pytest.raises(UserError, match=name.rpartition(".")[0]):
            ckpt.load_optimizers(optimizers, {name: tensor}, tmp_path)


def test_write_text_replaces_whole_files(tmp_path):
    ckpt.write_text(tmp_path / "a.txt", "old")
    ckpt.write_text(tmp_path / "a.txt", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "new")]
