"""Train each config of a JSON file with and without `training.compile objective`, and print what came of it as JSON.

A process of its own, since the tests' checks of shapes wrap every constructor in code that torch.compile cannot trace.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from looped.config import load_config
from looped.training import compiled
from looped.training.train import open_trainer


def trained(config, folder):
    """(parameters, number of graphs after each step)."""
    graphs = []
    with open_trainer(config, folder, evaluate=lambda *_: {}, quiet=True) as trainer:
        while not trainer.finished:
            trainer.step()
            graphs.append(counters["stats"]["unique_graphs"])
        return [weight.detach().clone() for weight in trainer.objective.parameters()], graphs


def main(configs, folder):
    eager = {"backend": "aot_eager"}
    compiled.COMPILE["objective"] = replace(
        compiled.COMPILE["objective"], rule=partial(compiled.compile_whole, **eager),
        update=partial(compiled.compile_update, **eager))
    found = {}
    for number, (name, settings) in enumerate(configs.items()):
        torch._dynamo.reset()
        counters.clear()
        config = load_config(None, settings)
        ours, graphs = trained(config.replace(**{"training.compile": "objective"}), folder / f"{number}-graph")
        theirs, _ = trained(config, folder / f"{number}-plain")
        found[name] = {"graphs": graphs, "breaks": dict(counters["graph_break"]),
                       "difference": max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
