"""Settings that do nothing are named; the table of who reads what is held against what runs read and what changes them.
"""

import re
import typing
import warnings

import pytest
import torch

from looped.cli import main
from looped.config import Config, describe_settings, load_config
from looped.config.arms import parse_arms
from looped.config.base import Section
from looped.config.rules import RULES
from looped.config.unread_settings import READERS, not_read_under, notice, notice_arms, set_names, short_warmup, unread
from looped.data.from_config import open_data
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom
from looped.training.heldout import heldout_figures
from looped.training.optim import build_optimizers, lr_factor, set_lr

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

OBJECTIVES = tuple(RULES)
SMALL = {
    "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2, "recurrence.mean": 2, "recurrence.backprop": 1,
    "denoise.cond_width": 8, "denoise.target.dim": 4, "masked.cond_width": 8, "supervision.segments": 2,
    "fixed_point.max_steps": 4, "training.batch_size": 4, "evaluation.depths": [1, 2], "evaluation.num_problems": 6,
    "evaluation.prompt_length": 4, "data.length": 16, "data.vocab_size": 257}
KINDS = {
    "text": {},
    "task": {"task.name": "prefix-sums", "task.difficulty": [1, 4], "denoise.context": "inject"},
    "classify": {"images.source": "digits", "images.max_train": 32, "images.max_heldout": 8,
                 "denoise.context": "inject"},
    "generate": {"images.source": "digits", "images.max_train": 32, "images.max_heldout": 8,
                 "denoise.context": "inject", "images.goal": "generate", "model.num_prelude_layers": 0,
                 "model.num_coda_layers": 0, "model.injection": "none"}}
OWN = {"blockwise": {"blocks.num": 2}, "noprop-dt": {"blocks.num": 2},
       "forward-forward": {"model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none"}}
VARIANTS = {
    "blocks of masked": ("text", {"objective": "masked", "blocks.num": 2}),
    "exit gate": ("text", {"objective": "full", "model.exit_gate": True, "recurrence.loss_on": "gate"}),
    "distil": ("text", {"objective": "full", "recurrence.loss_on": "distil"}),
    "blocks of a loop": ("text", {"objective": "full", "blocks.num": 2}),
    "segments": ("task", {"objective": "one-step", "supervision.update": "segment", "task.difficulty": [4, 4]}),
    "vector": ("text", {"objective": "full", "model.state_init": "vector", "model.latent_updates": 2}),
    "implicit": ("task", {"objective": "fixed-point", "fixed_point.gradient": "implicit"}),
    "head start": ("text", {"objective": "fixed-point", "fixed_point.head_start": "pass"}),
    "one-hot": ("classify", {"objective": "noprop-ct", "noprop.embedding": "one-hot"}),
    "core runs": ("task", {"model.core_runs": 2, "denoise.order": "confidence"}),
    "trained steps": ("text", {"denoise.train_steps": 3, "denoise.train_steps_drawn": True}),
    "confidence": ("task", {"denoise.order": "confidence"}),
    "log-normal": ("task", {"denoise.noise.distribution": "log-normal"}),
    "restart": ("task", {"denoise.solver": "restart"}),
    "top-k": ("task", {"denoise.bridge": "top-k"}),
    "fixed": ("text", {"objective": "truncated", "recurrence.distribution": "fixed", "recurrence.backprop": 3}),
    "wsd": ("text", {"objective": "ar", "optim.schedule": "wsd"}),
    "constant": ("text", {"objective": "ar", "optim.schedule": "constant"}),
    "muon": ("text", {"objective": "ar", "optim.name": "muon"}),
    "trajectories": ("task", {"evaluation.trajectories": 2}),
    "randaugment": ("classify", {"objective": "full", "images.randaugment": True})}


def configs():
    for objective in OBJECTIVES:
        for kind, flags in KINDS.items():
            try:
                config = load_config(None, SMALL | flags | OWN.get(objective, {}) | {"objective": objective})
            except UserError:
                continue
            yield pytest.param(config, id=f"{objective}-{kind}")
    for name, (kind, flags) in VARIANTS.items():
        yield pytest.param(load_config(None, SMALL | KINDS[kind] | flags), id=name)


def outcome(config):
    """All that comes of a step of training: its losses before and after, and held-out figures where no text is read."""
    data = None if config.kind.name == "text" else open_data(config)
    objective = build_objective(config, build(config, data.vocab_size if data else 257, data.picture if data else None))
    if data is None:
        batch = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(0))
    else:
        batch = data.train.batch(0, batch_size=4, seed=0)
    losses, optimizers = [], build_optimizers(objective, config.optim)
    for step in range(2):
        set_lr(optimizers, lr_factor(step / 2, step, config.optim))
        loss = objective(batch, StepRandom(0, step, count=4)).value
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses, heldout_figures(objective, data, config) if data else {}


def candidates(name, value):
    annotation = None
    section = Config
    for part in name.split("."):
        field = section.model_fields[part]
        annotation, section = field.annotation, type(field.default)
    yield from (option for option in typing.get_args(annotation) if isinstance(option, str))
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value / 2, value * 2)
    elif isinstance(value, tuple):
        yield from ([each + 1 for each in value], [1, 2], ["x"])
    yield from (1, 2, 0.5, True, "x", {"x": 1}, 257)


def altered(config, name):
    """The config with another value of a setting that validates; None where there is none."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    for candidate in candidates(name, value):
        try:
            other = config.replace(**{name: candidate})
        except UserError:
            continue
        if other != config:
            return other
    return None


NAMES = [name for name, _, _ in describe_settings()]


@pytest.mark.parametrize("config", configs())
def test_what_the_table_says_is_not_read_changes_nothing(config):
    """All such settings altered together leave the losses of training and the held-out figures as they were, to the
    bit."""
    changed, names = config, []
    for name in NAMES:
        if not_read_under(config, name) and not name.startswith("data."):  # the text is given here, not read
            other = altered(changed, name)
            if other is not None and not_read_under(other, name):
                changed, names = other, [*names, name]
    assert len(names) > 20
    assert outcome(changed) == outcome(config)


def test_what_is_read_does_change_something():
    """The positive control of the test above."""
    config = load_config(None, SMALL | {"objective": "full"})
    assert not_read_under(config, "recurrence.mean") == ""
    assert outcome(config.replace(**{"recurrence.mean": 3})) != outcome(config)


SECTIONS = ("recurrence.", "revisit.", "supervision.", "fixed_point.", "denoise.", "masked.", "noprop.",
            "forward_forward.")
FOR_COMPARE = {"recurrence.mean"}
"""Read of denoisers and masked diffusion by `looped compare` alone: the depth of its samples."""
FOR_TEXT = {"recurrence.damping"}
"""Read where a loop is evaluated, which `outcome` does not do on text."""
HANDED_ON = {"recurrence.loss_on", "recurrence.backprop", "denoise.bridge_top_k", "fixed_point.phantom_steps",
             "fixed_point.tau"}
"""Read together with what decides that they do nothing, as the test above shows."""


def paths(section=Config, prefix=""):
    yield section, prefix
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            yield from paths(type(field.default), f"{prefix}{name}.")


@pytest.fixture
def reads(monkeypatch):
    """The settings that somebody has read."""
    where, seen, original = dict(paths()), set(), Section.__getattribute__

    def recording(self, name):
        if type(self) in where and name in type(self).model_fields:
            seen.add(where[type(self)] + name)
        return original(self, name)

    monkeypatch.setattr(Section, "__getattribute__", recording, raising=False)
    return seen


@pytest.mark.parametrize("config", configs())
def test_what_a_run_never_reads_is_in_the_table_and_what_it_reads_of_a_rule_is_not(config, reads):
    reads.clear()
    outcome(config)
    found = {name for name in reads if name.startswith(SECTIONS)}
    own = {"recurrence": ("full", "truncated", "progressive"), "revisit": ("full", "truncated"),
           "supervision": ("one-step",), "fixed_point": ("fixed-point",), "masked": ("masked",),
           "forward_forward": ("forward-forward",),
           "noprop": ("noprop-dt", "noprop-ct", "noprop-fm"), "denoise": ("denoise", "blockwise")}
    for name in NAMES:
        section = name.split(".")[0]
        if section in own and config.objective not in own[section] and name not in found | FOR_COMPARE | FOR_TEXT:
            assert not_read_under(config, name), name
    silent = {name for name in found if not_read_under(config, name)}
    assert silent <= HANDED_ON


@pytest.mark.parametrize(("flags", "under"), [
    ({"objective": "full", "denoise.noise": "paper"}, {"denoise.noise": "objective full"}),
    ({"objective": "full", "recurrence.backprop": 2}, {"recurrence.backprop": "objective full"}),
    ({"objective": "denoise", "denoise.restart_level": 2.0}, {"denoise.restart_level": "denoise.solver ancestral"}),
    ({"optim.decay_fraction": 0.5}, {"optim.decay_fraction": "optim.schedule cosine"}),
    ({"optim.muon_lr": 0.5}, {"optim.muon_lr": "optim.name adamw"}),
    ({"objective": "masked", "blocks.overlap": 0.1}, {"blocks.overlap": "blocks.num 1"}),
    ({"objective": "full", "recurrence.gate_entropy": 0.5}, {"recurrence.gate_entropy": "recurrence.loss_on last"}),
    ({"objective": "denoise", "model.exit_gate": True}, {"model.exit_gate": "objective denoise"}),
    ({"objective": "ar", "model.exit_gate": True}, {"model.exit_gate": "objective ar"}),
    ({"evaluation.levels": 8}, {"evaluation.levels": "objective denoise"}),
    ({"objective": "truncated", "recurrence.distribution": "fixed", "recurrence.backprop": 9},
     {"recurrence.backprop": "recurrence.mean 8, beyond which there are no steps"}),
    ({"data.heldout_bytes": 5}, {"data.heldout_bytes": "data.streaming False"}),
    ({"data.streaming": True}, {"data.streaming": "data.dataset null"}),
    ({"data.dataset": "a/b", "data.streaming": "endless", "data.tokenizer": "t", "data.heldout": 0.5},
     {"data.heldout": "data.streaming endless"}),
    ({"data.mixture.a.weight": 2, "data.split": "x"}, {"data.split": "data.mixture"}),
    ({"data.mixture": {"a": {"split": "test"}, "b": {"dataset": "x", "split": "test"}}},
     {"data.mixture.a.split": "data.mixture.a.dataset null"}),
    ({"data.mixture.a.dataset_config": "x", "data.mixture.b.split": "train"},
     {"data.mixture.a.dataset_config": "data.mixture.a.dataset null"}),
    ({"task.name": "prefix-sums", "denoise.context": "inject", "data.mixture": {"a": {"split": "test"}}},
     {"data.mixture": "task.name prefix-sums"}),
    ({"data.tokenizer": "t.json", "data.vocab_size": 300}, {"data.vocab_size": "data.tokenizer t.json"}),
    ({"task.difficulty": [1, 2]}, {"task.difficulty": "text (no task.name, no images.source)"}),
    ({"task.name": "prefix-sums", "denoise.context": "inject", "task.difficulty": [4, 4], "task.per_problem": False},
     {"task.per_problem": "task.difficulty [4, 4]"}),
    ({"objective": "full", "denoise.bridge": "sampled"}, {}),  # as it is anyway
    ({"objective": "truncated", "recurrence.backprop": 2, "optim.schedule": "wsd", "optim.decay_fraction": 0.5}, {}),
])
def test_a_setting_that_does_nothing_is_named_with_what_it_is_not_read_under(flags, under):
    assert unread(load_config(None, flags), flags) == under


@pytest.mark.parametrize(("flags", "said"), [
    ({"optim.warmup_steps": 1000, "training.budget": 20}, "optim.warmup_steps 1000 is more than the 20 steps"),
    ({"optim.warmup_steps": 1000, "training.budget": 20 * 32 * 128, "training.budget_unit": "tokens"}, "the 20 steps"),
    ({"optim.warmup_steps": 20, "training.budget": 20}, ""),
    ({"optim.warmup_steps": 1000, "training.budget": 20, "training.budget_unit": "seconds"}, ""),
])
def test_a_warmup_that_never_ends_is_named_where_the_steps_can_be_told(flags, said):
    config = load_config(None, flags)
    assert said in short_warmup(config)
    assert bool(said) == bool(short_warmup(config))
    if said and config.training.budget_unit == "steps":
        assert max(lr_factor(step / 20, step, config.optim) for step in range(20)) < 0.02


def test_arms_are_told_of_their_own_settings_and_of_those_that_none_reads():
    base = {"optim.muon_lr": 0.5, "denoise.bridge": "hard", "recurrence.backprop": 2}
    arms = parse_arms(load_config(None, base), "full recurrence.per_sequence=false,denoise")
    with pytest.warns(UserWarning, match="no effect") as caught:
        notice_arms(arms, base)
    assert [str(each.message) for each in caught] == [
        "arm 'full recurrence.per_sequence=false': recurrence.per_sequence has no effect under objective full",
        "optim.muon_lr has no effect under optim.name adamw",
        "recurrence.backprop has no effect under objective full and objective denoise"]


def test_the_presets_of_arms_are_not_complained_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice_arms(parse_arms(load_config(None), "ar,truncated,denoise:paper,denoise:concat"), [])


@pytest.mark.parametrize(("flag", "value", "arm", "said"), [
    ("denoise.bridge", "hard", "denoise:paper", True),
    ("denoise.noise.sigma_min", 0.1, "denoise:paper", True),        # the variant sets the whole section
    ("denoise.noise", "wide", "denoise:paper", True),
    ("denoise.bridge", "soft", "denoise:paper", False),             # what the variant sets as well
    ("denoise.noise.sigma_min", 0.002, "denoise:paper", False),
    ("denoise.noise", "paper", "denoise:paper", False),
    ("denoise.bridge", "hard", "denoise:paper denoise.bridge=hard", False),
    ("denoise.bridge", "hard", "denoise:concat", False),
    ("denoise.bridge", "hard", "denoise", False),
])
def test_a_flag_that_the_variant_of_an_arm_overrides_is_named(flag, value, arm, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notice_arms(parse_arms(load_config(None, {flag: value}), f"{arm},plain=denoise"), {flag: value})
    wanted = f"--{flag} has no effect on arm '{arm}', whose variant sets it; add {flag}=VALUE to the arm"
    assert [str(each.message) for each in caught] == ([wanted] if said else [])


def test_every_name_of_the_table_is_a_setting_or_a_section():
    known = {".".join(name.split(".")[:depth]) for name in NAMES for depth in (1, 2, 3)}
    assert {name for readers in READERS for name in readers.settings} <= known
    assert len(set_names(load_config(None, {"model.width": 64, "denoise.noise.sigma_max": 30.0}))) == 2


def test_the_command_says_it_once_and_lists_what_a_file_holds_for_others(capsys):
    with pytest.warns(UserWarning, match=re.escape("denoise.noise has no effect under objective full")) as caught:
        assert main(["train", "configs/stdlib-denoise.yaml", "--dry-run", "--objective", "full", "--denoise.noise",
                     "paper", "--recurrence.mean", "1"]) == 0
    assert len(caught) == 1
    listed = capsys.readouterr().out.splitlines()[-1]
    assert listed == "denoise.target.dim has no effect under objective full"


def test_a_flag_within_a_setting_is_not_one_of_the_file(capsys):
    with pytest.warns(UserWarning, match=re.escape("data.mixture has no effect under task.name sudoku")):
        assert main(["info", "configs/sudoku4-denoise.yaml", "--data.mixture.web.dataset", "x"]) == 0
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["smoke", "stdlib-full", "stdlib-denoise", "stdlib-truncated", "sudoku4-denoise",
                                  "sudoku4-trm", "digits-denoise", "digits-generate", "vit-release"])
def test_a_shipped_file_earns_no_notice(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice(load_config(f"configs/{name}.yaml"), [])


def test_a_comparison_says_it_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setattr("looped.compare.compare", lambda plan, **_: 0)
    with pytest.warns(UserWarning, match="no effect") as caught:
        assert main(["compare", "configs/stdlib-full.yaml", "--budget", "tokens", "--amount", "1000", "--objectives",
                     "full,truncated,quick=full denoise.bridge=hard", "--optim.muon_lr", "0.5", "--recurrence.backprop",
                     "2", "--out", str(tmp_path)]) == 0
    assert [str(each.message) for each in caught] == [
        "arm 'quick': denoise.bridge has no effect under objective full",
        "optim.muon_lr has no effect under optim.name adamw"]  # and truncated reads recurrence.backprop


def test_flags_leave_the_values_they_are_given_as_they_were():
    sources = {"a": {"weight": 1}, "b": {"weight": 1}}
    config = load_config(None, {"data.mixture": sources, "data.mixture.a.weight": 3})
    assert config.data.mixture["a"].weight == 3
    assert sources == {"a": {"weight": 1}, "b": {"weight": 1}}


def test_a_flag_within_a_setting_is_checked_as_that_setting():
    flags = {"task.name": "sudoku", "task.options.size": 4, "data.mixture.a.weight": 3, "denoise.context": "inject"}
    found = unread(load_config(None, flags), flags)
    assert found == {"data.mixture": "task.name sudoku"}


def test_a_common_flag_that_every_arm_sets_itself_is_told():
    config = load_config(None, {"task.name": "sudoku", "denoise.context": "inject"})
    own = "evaluation.trajectories=2"
    with pytest.warns(UserWarning, match=r"--evaluation\.trajectories has no effect, since every arm sets it itself"):
        notice_arms(parse_arms(config, f"denoise {own},full {own} evaluation.state_noise=0.1"),
                    ["evaluation.trajectories"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice_arms(parse_arms(config, f"denoise {own},full"), ["evaluation.num_problems"])
