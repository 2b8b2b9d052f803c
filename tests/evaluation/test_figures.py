"""docs/figures.md names every metric and column that the code writes, and no other."""

import ast
import json
import re
from collections import defaultdict
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from looped.config import load_config
from looped.data.mixed_stream import MixedStream
from looped.data.token_windows import TokenStream
from looped.domains import DOMAINS
from looped.evaluation.benchmarks import Figure, TaskRow
from looped.evaluation.dataframes import COLUMNS, FIRST, LAST
from looped.evaluation.metric_rows import Row, example_lines
from looped.evaluation.options import Options
from looped.evaluation.token_losses import TokenLosses
from looped.training.logs import TIMING

pytestmark = pytest.mark.usefixtures("unchecked")  # stand-ins for data

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
RECORDED = ROOT / "tests/golden/recorded"
MAKERS = {"summarise", "Row", "take", "took", "_distinct_2", "example_lines"}
"""Calls whose first argument, or a string after rows, is the name of a metric."""


def named(section, page=PAGE):
    """The names in the first cells of the tables of a section."""
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`.*?) \|", body, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def recorded():
    """(metrics, keys) by file, of all golden cases."""
    metrics, keys = defaultdict(set), defaultdict(set)
    for path in RECORDED.glob("*.json"):
        for name, lines in json.loads(path.read_text(encoding="utf-8"))["files"].items():
            if name.endswith(".jsonl") and isinstance(lines, list):
                file = name.rpartition("/")[2]
                metrics[file] |= {line["metric"] for line in lines if "metric" in line}
                keys[file] |= {key for line in lines for key in line}
    return metrics, keys


def in_source():
    """Metrics that are written out as strings where rows are made: those of rare options are in no recording."""
    found = set()
    for path in (ROOT / "looped").glob("[ed][vo]*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in MAKERS:
                found |= {each.value for each in node.args[:2] if isinstance(each, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


METRICS, KEYS = recorded()


def test_every_metric_of_an_evaluation_is_in_the_table_and_no_other():
    of_depth, of_probes = named("Metrics of eval/depth.jsonl"), named("Metrics of eval/probes.jsonl")
    written = METRICS["depth.jsonl"] | METRICS["compare.jsonl"]
    assert len(written) > 35
    assert {"tokens_per_second", "block_alone", "nats_with_exit"} <= in_source() - written - METRICS["probes.jsonl"]
    assert written - of_depth == METRICS["probes.jsonl"] - of_probes == set()
    assert of_depth | of_probes == written | METRICS["probes.jsonl"] | in_source()


def ids():
    """The columns of eval/sequences.jsonl, by asking each domain."""
    batch = SimpleNamespace(targets=torch.zeros(2, 1), labels=torch.zeros(2))
    stream = TokenStream("held-out", np.arange(99), end_of_text=0)
    data = {"text": SimpleNamespace(heldout=stream), "classify": SimpleNamespace(heldout=lambda size: [batch])}
    data["puzzles"] = SimpleNamespace(num_heldout=lambda num, difficulty: num)
    config = load_config(None, {"data.length": 20})
    mixed = MixedStream("held-out", {"a": stream}, {"a": Fraction(1)})
    return {*mixed.places(2, 20)} | {name for kind, domain in DOMAINS.items()
            for line in domain.sequences(data.get(kind, data["classify"]), config, Options(difficulties=[3]))
            for name in line}


def test_every_column_of_an_evaluation_is_in_the_table_and_no_other():
    (example,) = example_lines("x", {1: torch.ones(2)}, difficulty=1, by="a", twin="b", trajectories=2)
    _, (question,) = Figure("acc", 0.5, [0, 1], True, 0.25, {}).lines()
    written = {field.name for field in (*fields(Row), *fields(TaskRow))} | ids() | example.keys() | question.keys()
    for file in ("depth.jsonl", "samples.jsonl", "probes.jsonl"):
        written |= KEYS[file]
    tokens = TokenLosses(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2), 1).table({})
    written |= {*tokens.columns, *FIRST, *LAST, *(name for names in COLUMNS.values() for name in names)}
    assert {"document", "offset", "index", "label"} <= ids()
    assert named("Columns of the files in eval/") == written | {"evaluation"}  # of tables alone


def test_every_name_of_metrics_jsonl_is_in_the_table_and_no_other():
    sources = {name for name in KEYS["metrics.jsonl"] if "/" in name}
    assert {name.partition("/")[0] for name in sources} == {"loss", "next_token"}
    written = {re.sub(r"\d+$", "N", name) for name in KEYS["metrics.jsonl"] - sources} | {*TIMING}
    written |= {re.sub(r"/.*", "/SOURCE", name) for name in sources}
    # Of recurrence.progressive_weight below 1, and of supervision.update segment.
    unrecorded = {"loss_full", "leaving", "segments_used"}
    assert named("metrics.jsonl") == written | unrecorded


def test_every_column_of_compare_jsonl_is_in_a_table():
    own, others = named("compare.jsonl"), named("Columns of the files in eval/") | named("metrics.jsonl")
    assert KEYS["compare.jsonl"] - own - others == set()
    assert own <= KEYS["compare.jsonl"] | {"own"}  # which is a share of seconds, and recordings leave time out


@pytest.mark.parametrize(("section", "name"), [("Metrics of eval/depth.jsonl", "mauve"), ("metrics.jsonl", "lr"),
                                               ("Columns of the files in eval/", "sigma")])
def test_a_name_without_a_line_is_missed(section, name):
    """The positive control: the table is read, name by name."""
    assert name in named(section)
    assert named(section) - named(section, PAGE.replace(f"`{name}`", "`other`")) == {name}
