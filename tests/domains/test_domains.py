"""Every kind of data has a domain, every option of `looped eval` and `looped generate` one that knows it; the others
refuse it in one form of sentence."""

from dataclasses import fields
from pathlib import Path

import pytest

from looped.cli.eval import Eval
from looped.cli.generate import OF_WHAT, Generate
from looped.config import load_config
from looped.config.data_kinds import KINDS
from looped.config.rules import RULES
from looped.data.from_config import SOURCES
from looped.domains import DOMAINS, domain_of
from looped.domains.base import OPTIONS, Options, Request
from looped.errors import UserError, flag_of

CONFIGS = {"text": {}, "puzzles": {"task.name": "prefix-sums", "denoise.context": "inject"},
           "classify": {"images.source": "digits", "denoise.context": "inject"},
           "generate": {"images.source": "digits", "images.goal": "generate", "denoise.context": "inject",
                        "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none"}}
RUN = Path("runs/a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_known_everywhere_by_one_name(kind):
    config = load_config(None, CONFIGS[kind])
    assert config.kind.name == domain_of(config).name == kind
    assert kind in SOURCES
    assert any(kind in rule.kinds for rule in RULES.values())


def test_there_are_no_other_domains():
    assert DOMAINS.keys() == KINDS.keys() == SOURCES.keys() == CONFIGS.keys()


def test_every_option_is_known_to_some_domain():
    assert set(OPTIONS) == set().union(*(domain.flags for domain in DOMAINS.values()))
    assert set(OPTIONS) <= {field.name for field in fields(Eval)}
    assert {field.name for field in fields(Options)} == set(OPTIONS) - {"text", "tasks", "puzzles"}
    assert set(OF_WHAT) == set().union(*(domain.asks for domain in DOMAINS.values()))
    assert {field.name for field in fields(Request)} <= {field.name for field in fields(Generate)} | {"prompts"}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("flag", OPTIONS)
def test_an_option_is_taken_or_refused_with_what_it_is_for(kind, flag):
    config = load_config(None, CONFIGS[kind])
    domain = domain_of(config)
    if flag in domain.flags:
        domain.check(config, [flag], RUN)
        return
    why = f"{flag_of(flag)} is for {OPTIONS[flag]}, and runs/a {domain.does(config)}; leave it out"
    with pytest.raises(UserError, match=why):
        domain.check(config, [flag], RUN)


@pytest.mark.parametrize("flag", ["probes", "twin", "trajectories", "per_token"])
def test_what_predicts_no_next_token_has_no_options_of_it(flag):
    config = load_config(None, {"objective": "masked"})
    domain_of(config).check(config, ["judge"], RUN)
    with pytest.raises(UserError, match=f"{flag_of(flag)} is for rules that predict the next token"):
        domain_of(config).check(config, [flag], RUN)
