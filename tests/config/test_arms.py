"""Arms of a comparison: text becomes a config with just the named changes, or one sentence."""

import subprocess
import sys

import pytest

from looped.config import load_config
from looped.config.arms import ARMS, parse_arm, parse_arms
from looped.config.denoise import DENOISE_PRESETS
from looped.config.rules import RULES
from looped.errors import UserError


@pytest.fixture(scope="module")
def config():
    return load_config(None, {"model.width": 32, "denoise.noise": "paper"})


def test_an_arm_changes_what_it_names_and_nothing_else(config):
    arms = parse_arms(config, "ar, truncated,denoise:concat,denoise  model.width=64 optim.betas=[0.8,0.9]")
    assert [arm.name for arm in arms] == ["ar", "truncated", "denoise:concat",
                                          "denoise model.width=64 optim.betas=[0.8,0.9]"]
    assert arms[0].config == config.replace(objective="ar")
    assert arms[2].config == config.replace(**{"objective": "denoise", "denoise.context": "concat"})
    assert arms[3].config == config.replace(**{"model.width": 64, "optim.betas": [0.8, 0.9]})


def test_the_paper_is_a_dictionary_of_settings():
    plain = load_config(None)
    arm = parse_arm(plain, "denoise:paper").config
    assert arm == plain.replace(**DENOISE_PRESETS["paper"])
    assert (arm.denoise.noise.sigma_max, arm.denoise.posterior, arm.denoise.weight) == (80, False, "edm")


@pytest.mark.parametrize("name", ARMS)
def test_every_known_name_is_an_arm(config, name):
    """Some of them with what they cannot do without."""
    settings = " blocks.num=2" if name in ("blockwise", "noprop-dt") else ""
    if name == "forward-forward":
        settings = " model.injection=none model.num_prelude_layers=0 model.num_coda_layers=0"
    if name in RULES and RULES[name].kinds == ("classify",):
        config = config.replace(**{"objective": "ar", "images.source": "digits"})
    assert parse_arm(config, name + settings).config.objective == name.split(":")[0]


def test_an_arm_has_blocks_of_its_own(config):
    config = config.replace(**{"model.num_core_layers": 12})
    text = "ar,blockwise blocks.num=3,blockwise blocks.num=3 blocks.layers=[3,6,3],ar blocks.num=3"
    one, even, uneven, twin = (arm.config for arm in parse_arms(config, text))
    assert [each.block_layers for each in (one, even, uneven, twin)] == [(12,), (4, 4, 4), (3, 6, 3), (4, 4, 4)]
    assert twin.main_depth == 3


def test_a_name_of_ones_own_is_that_of_tables_and_files_and_changes_nothing_else(config):
    named, plain = parse_arms(config, "quick=denoise:concat  optim.lr=1e-2,denoise:concat optim.lr=1e-2")
    assert (named.name, named.slug, named.text) == ("quick", "quick", "denoise:concat optim.lr=1e-2")
    assert (plain.name, plain.text) == ("denoise:concat optim.lr=1e-2",) * 2
    assert named.config == plain.config


def test_an_objective_may_name_an_arm_of_its_own_kind_and_slugs_still_differ(config):
    arms = parse_arms(config, "ar=ar optim.lr=1,denoise-concat=ar,denoise:concat,t.1=truncated,t.1_+=full")
    assert [arm.name for arm in arms] == ["ar", "denoise-concat", "denoise:concat", "t.1", "t.1_+"]
    assert [arm.slug for arm in arms] == ["ar", "denoise-concat", "denoise-concat-v2", "t.1", "t.1_+"]


def test_slugs_are_names_of_files_and_differ(config):
    slugs = [arm.slug for arm in parse_arms(config, "denoise:concat,denoise denoise.solver=euler,denoise "
                                                    "denoise.solver=heun,ar")]
    assert len(set(slugs)) == 4
    assert not any(set(slug) & set("/: *") for slug in slugs)
    long = "denoise optim.lr=0.00100000000000000000000000000000000000000000000000000000000000000000"
    assert len({arm.slug for arm in parse_arms(config, f"{long}1,{long}2")}) == 2


@pytest.mark.parametrize(("text", "why"), [
    ("ar,trunkated", "did you mean 'truncated'"),
    ("denoise:papre", "did you mean 'denoise:paper'"),
    ("ar,,denoise", "empty entry"),
    ("", "empty entry"),
    ("ar,denoise,ar", "listed twice"),
    ("denoise context", "write it as denoise.context=concat"),
    ("denoise denoise.contxt=concat", "did you mean 'context'"),
    ("denoise data.length=8", "which all arms share"),
    ("denoise seed=8", "which all arms share"),
    ("full optim.lr=1 model.width=64 optim.lr=2", "arm 'full' sets optim.lr twice; keep one"),
    ("denoise evaluation.num_problems=8", "which all arms share"),
    ("denoise model.width=[", "not a YAML value"),
    ("a=ar,a=denoise", "'a' is listed twice; give the two different names"),
    ("a=ar,a=ar", "'a' is listed twice; list it once"),
    ("denoise,denoise=denoise optim.lr=1", "'denoise' is listed twice; give the two different names"),
    ("truncated=denoise", "'truncated' cannot name an arm of denoise, because it is another objective"),
    ("a/b=ar", "'a/b' cannot name an arm, because the name is part of file names"),
    ("=ar", "'' cannot name an arm"),
    (".=ar", r"'\.' cannot name an arm"),
    ("denoise:concat=denoise:concat", "'denoise:concat' cannot name an arm"),
    ("ä=ar", "'ä' cannot name an arm"),
    (f"{'a' * 41}=ar", "up to 40 letters"),
    ("a=denoize", "objective 'denoize' in 'a=denoize' is unknown; did you mean 'denoise'"),
    ("a= ar", "objective '' in 'a=' is unknown"),
    ("optim.lr=1e-2 denoise", "objective '1e-2' in 'optim.lr=1e-2' is unknown"),
    ("a=b=ar", "objective 'b=ar' in 'a=b=ar' is unknown"),
    ("a=denoise denoise.contxt=concat", "arm 'a': .*did you mean 'context'"),
])
def test_a_bad_arm_is_named_in_one_sentence(config, text, why):
    with pytest.raises(UserError, match=why) as error:
        parse_arms(config, text)
    assert "\n" not in str(error.value)


def test_arms_are_read_without_torch():
    code = "import sys, looped.config.arms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_value_in_brackets_may_have_commas_spaces_and_further_brackets():
    text = ("a=full recurrence.mean=2 recurrence.stages=[{until: 0.25, mean: 1}, {until: 0.5, mean: 3}], "
            "b=truncated recurrence.mean=4 recurrence.distribution=listed recurrence.depths={1: 5, 4: 1}")
    a, b = parse_arms(load_config(None), text)
    assert [(stage.until, stage.mean) for stage in a.config.recurrence.stages] == [(0.25, 1), (0.5, 3)]
    assert b.config.recurrence.depths == {1: 5, 4: 1}
    assert (a.own, b.name) == (("recurrence.mean", "recurrence.stages"), "b")


def test_an_arm_has_its_own_trajectories_and_choice():
    """Each rule has its own: a halting head, a denoiser's second reading."""
    config = load_config(None, {"task.name": "sudoku", "denoise.context": "inject"})
    arms = parse_arms(config, "denoise evaluation.trajectories=4 evaluation.choose=consistent,"
                              "one-step evaluation.trajectories=8 evaluation.choose=head evaluation.state_noise=0.1")
    assert [(arm.config.evaluation.trajectories, arm.config.evaluation.choose) for arm in arms] == [
        (4, "consistent"), (8, "head")]
    with pytest.raises(UserError, match="consistent"):
        parse_arms(config, "full evaluation.trajectories=4 evaluation.choose=consistent")
