"""`looped info`: describe the machine, a run or a config."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, costs_of, no_settings
from looped.config import load_config
from looped.config.unread_settings import notice, unread_in_file


@dataclass
class Info(Verb):
    """Show versions, devices and attention backends (with the reason if one cannot run), or describe a run or
    config."""

    target: Positional[Path | None] = None
    """a run's folder or a YAML file; if not given, the machine is described"""

    def __call__(self, settings: Settings) -> None:
        if self.target is None:
            no_settings(settings, "info without a target")
            _describe_machine()
        elif self.target.is_dir():
            no_settings(settings, "info RUN")
            _describe_run(self.target)
        else:
            config = load_config(self.target, settings)
            notice(config, settings)
            print(costs_of(config), *unread_in_file(config, settings), sep="\n")


def _describe_machine() -> None:
    import platform

    import torch

    from looped.devices import DTYPES, Placement, devices_here
    from looped.nn.attention import available_backends, choose_backend
    from looped.nn.masks import Causal
    from looped.training.runs import versions

    print(f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    print("  ".join(f"{name} {version or 'missing'}" for name, version in versions().items()))
    for name in reversed(devices_here()):
        place = Placement(torch.device(name), "fp32" if name == "cpu" else "bf16")
        print(place.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the list says the same
            chosen = choose_backend("auto", Causal(), name, DTYPES[place.dtype], needs_gradient=True)
        print(f"  attention auto: {chosen}")
        for backend, reason in available_backends(name, DTYPES[place.dtype]).items():
            print(f"  attention {backend}: {f'no, {reason}' if reason else 'yes'}")


def _describe_run(path: Path) -> None:
    from looped.config.unread_settings import num_sequences_of
    from looped.data.from_config import located
    from looped.data.mixture import shares_said
    from looped.training.checkpoint import list_checkpoints
    from looped.training.runs import load_run, read_stamp, started_in

    run, stamp = load_run(path), read_stamp(path)
    print(f"{path}: {run.config.objective}, {sum(p.numel() for p in run.objective.parameters()):,} parameters, "
          f"step {run.step} of {run.config.training.budget} {run.config.training.budget_unit}")
    if run.config.blocks.num > 1:
        alone = run.config.blocks.alone
        here = ", of which a solver step runs one" * run.config.rule.independent
        print(f"a core of {run.config.blocks.num} blocks of {', '.join(map(str, run.config.block_layers))} layers"
              + (here if alone is None else f", of which block {alone} alone is here"))
    if run.config.model.attention != "auto":
        print(f"attention by {run.config.model.attention} (model.attention), which may be changed")
    print(f"started {stamp.get('created')} by {' '.join(map(str, stamp.get('argv', [])))}")
    if run.identity.facts:
        given = ", given in Python" * run.identity.given
        print("data: " + ", ".join(f"{name} {value}" for name, value in run.identity.facts.items()) + given)
    for line in shares_said(located(run.config, started_in(path)).data, num_sequences_of(run.config)):
        print(line)
    print("checkpoints: " + ", ".join(folder.name for folder in list_checkpoints(path)))
