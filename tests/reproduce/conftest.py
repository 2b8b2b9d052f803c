"""Orders of suites, and a suite so small that it runs in a test."""

import pytest
import yaml

from looped.reproduce.plan import Asked, Order
from looped.reproduce.suite import find_suite, load_suite


@pytest.fixture
def order(tmp_path):
    """`order(name of a suite or path, scale, **asked)`."""
    def make(name, scale="cpu", **asked):
        path = find_suite(str(name))
        return Order(path, load_suite(path), Asked(scale, tmp_path / "out", **asked))

    return make


@pytest.fixture
def write(tmp_path):
    """`write(suite)`: the path of its file."""
    def go(suite):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(suite, sort_keys=False))
        return path

    return go


@pytest.fixture
def small():
    """`small(**changes)`: a suite of two arms, on the digits."""
    return lambda **changes: {
        "title": "Two", "reproduces": "nothing, table 0", "config": "digits-denoise.yaml", "budget": "layer-forwards",
        "arms": {"loop": {"text": "full", "published": {"accuracy": "97 %"}}, "once": {"text": "ar"}},
        "scales": {"cpu": {"time": "a second", "amount": 100}},
        "columns": [{"label": "accuracy", "where": {"kind": "figure", "metric": "accuracy", "depth": 1}}]} | changes
