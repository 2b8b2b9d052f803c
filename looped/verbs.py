"""The verbs of the command line. A verb's fields are its flags, its docstring is its help (tyro), calling it does the
work; what is heavy is imported there.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from looped.config import Config, describe_settings, dump_config, load_config
from looped.config_reads import notice, notice_arms, unread_in
from looped.errors import UserError
from looped.verb import Settings, Verb, check_range, no_settings, parse_depths, parse_levels
from looped.verb_eval import Eval
from looped.verb_generate import Generate


@dataclass
class Train(Verb):
    """Train a config in a run folder, or go on with a run that was interrupted: run the same command again.

    The folder holds config.yaml, metrics.jsonl, train.log, the tokenizer and the checkpoints. Ctrl-C saves and stops.
    """

    config: Positional[Path]
    """a YAML file, or the config.yaml of a run"""
    run: Path | None = None
    """the run's folder; runs/<name of the config> if not given, with -block0 and so on of a block alone"""
    block: str | None = None
    """hold and train this block of a core of several alone, 0 or 1 and so on; rank: each process that torchrun or
    accelerate starts takes the block of its rank, in a run of its own (with --run RUN in RUN-block0 and so on)"""
    dry_run: bool = False
    """only print the resolved config, the parameters, the FLOPs and the memory it would need"""

    def __call__(self, settings: Settings) -> int:
        if self.block is not None:
            settings = dict(settings) | {"blocks.alone": str(self._alone(settings))}
        config = load_config(self.config, settings)
        notice(config, settings)
        if self.dry_run:
            print(dump_config(config))
            print(_costs(config), *unread_in(load_config(self.config), config, settings), sep="\n")
            _print_cautions(config)
            return 0
        from looped.training.trainer import train

        return train(config, self._folder(config)).exit_code

    def _alone(self, settings: Settings) -> int:
        """The block that --block names. Raises UserError."""
        if "blocks.alone" in settings:
            raise UserError(f"--block {self.block} and --blocks.alone {settings['blocks.alone']} say the same; keep "
                            f"one of them")
        if self.block == "rank":
            from looped.training.processes import leave_group

            return leave_group(load_config(self.config, settings).blocks.num)
        try:
            return int(str(self.block))
        except ValueError:
            raise UserError(f"--block {self.block} is neither the number of a block nor rank; write for instance "
                            f"--block 0") from None

    def _folder(self, config: Config) -> Path:
        """Where the run lies."""
        name = "" if config.blocks.alone is None else f"-block{config.blocks.alone}"
        if self.run is not None:
            return self.run.with_name(self.run.name + name) if self.block == "rank" else self.run
        if not (self.config.parent / "stamp.json").exists():
            return Path("runs") / (self.config.stem + name)
        if load_config(self.config).blocks.alone == config.blocks.alone:  # the config of a run: that run
            return self.config.parent
        return self.config.parent.with_name(self.config.parent.name + name)


@dataclass
class Merge(Verb):
    """Put finished runs of single blocks together into the run of the whole model, which eval and generate can use.

    Every block must be there once, from the same config and data, and what the blocks share must be bitwise the same.
    """

    runs: Positional[tuple[Path, ...]]
    """folders of runs of `looped train --block`, in any order"""
    out: Path
    """the folder of the whole run, which must not exist"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "merge")
        from looped.training.merge import merge

        print(merge(self.runs, self.out))


@dataclass
class Bench(Verb):
    """Measure cost on this machine, each arm in a process of its own, interleaved.

    step: seconds, saved activation bytes, peak memory and layer forwards of a training step under each objective.
    flops: floating-point operations a second of the model beside those of a matrix product.
    memory: bytes that one of several blocks alone takes to train, beside the same layers end to end.
    """

    what: Positional[Literal["step", "flops", "memory"]]
    """step, flops or memory"""
    model: Positional[Path | None] = None
    """the YAML file of the model"""
    config: Path | None = None
    """the same as a flag"""
    objectives: str = "full,truncated,denoise"
    """arms of `step`; denoise:concat, :context, :paper are variants, settings follow after spaces, NAME=OBJECTIVE names
    an arm"""
    blocks: str = "1,2,4"
    """numbers of blocks of `memory`; 1 is all layers end to end (ar)"""
    repeats: int = 5
    """timed steps an arm; the median counts"""
    threads: int = 1
    """CPU threads"""
    device: str = "cpu"
    """the processor alone: what is measured are processes, their time and their memory"""
    json: bool = False
    """print JSON instead of a table"""

    def __call__(self, settings: Settings) -> None:
        check_range("--repeats", self.repeats)
        check_range("--threads", self.threads)
        if self.device not in ("cpu", "auto"):
            raise UserError(f"--device {self.device} is not for bench, which reads the time and the memory of "
                            f"processes and sees nothing of what another device does; leave it out, and read seconds "
                            f"and peak_bytes in the metrics.jsonl of a run there")
        path = self.model or self.config
        if path is None or None not in (self.model, self.config):
            raise UserError(f"bench {self.what} needs one YAML file; write looped bench {self.what} CONFIG")
        config = load_config(path, settings)
        from looped.arms import parse_arms, split_arms
        from looped.evaluation import cost, memory

        if self.what == "step":
            notice_arms(parse_arms(config, self.objectives), settings)
        else:
            notice(config, settings)
        if self.what == "memory":
            result, table = memory.bench_memory(config, parse_depths(self.blocks, "--blocks"), repeats=self.repeats,
                                                threads=self.threads), memory.format_memory
        elif self.what == "step":
            result, table = cost.bench_step(config, split_arms(self.objectives), repeats=self.repeats,
                                            threads=self.threads), cost.format_step
        else:
            result, table = cost.bench_flops(config, repeats=self.repeats, threads=self.threads), cost.format_flops
        print(json.dumps(result, indent=1) if self.json else table(result))


@dataclass
class Compare(Verb):
    """Train several objectives at one budget over several seeds, measure them on the same text (or the same problems of
    a task, or the same images), and write a report.

    Each run has a process of its own. Leaves a table (compare.md), rows (compare.jsonl), plots/*.png and a page that
    holds everything (report.html). The same command again goes on; what is finished is not done again.
    """

    config: Positional[Path]
    """the YAML file that all arms start from"""
    budget: Literal["tokens", "layer-forwards", "seconds"]
    """what every arm gets the same amount of"""
    objectives: str = "ar,truncated,denoise"
    """arms, the first is what the others are held against; settings of one follow it after spaces, denoise:concat,
    :context, :paper are variants, and NAME=OBJECTIVE gives an arm the name that tables and files have for it:
    "truncated,denoise,gated=denoise model.injection=gated" """
    amount: int | None = None
    """how much of the budget; training.budget if that is counted in the same unit"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    jobs: int = 1
    """runs at once; with a budget in seconds they should not have to share a processor"""
    depths: str | None = None
    """loop or solver steps to measure; 1, the mean trained depth and four times that if not given"""
    difficulties: str | None = None
    """of a task: the levels to measure besides the hardest trained one, as 16,32,64; those of evaluation.difficulties,
    or the task's own, if not given"""
    device: str = "auto"
    """the device that the trained runs are measured on: auto (the best there is: cuda, mps, cpu), cpu, cuda, cuda:1 or
    mps; training has the best there is"""
    dtype: str = "fp32"
    """their number format while they are measured: fp32, or bf16 or fp16 under autocast"""
    out: Path | None = None
    """the folder of the comparison; runs/compare-<name of the config> if not given"""

    def __call__(self, settings: Settings) -> int:
        for name in ("seeds", "jobs"):
            check_range(f"--{name}", getattr(self, name))
        if self.amount is not None and self.amount < 1:
            raise UserError(f"--amount {self.amount} is not at least 1")
        depths = parse_depths(self.depths) if self.depths is not None else None
        config = load_config(self.config, settings)
        if self.difficulties is not None:
            if not config.is_task:
                trained = "images" if config.is_images else "text"
                raise UserError(f"--difficulties are for tasks, and {self.config} trains on {trained}; leave them out")
            config = config.replace(**{"evaluation.difficulties": parse_levels(self.difficulties)})
        from looped.compare import compare, make_plan
        from looped.devices import Placement

        placement = Placement.of(self.device, self.dtype)
        plan = make_plan(config, self.objectives, unit=self.budget, amount=self.amount, num_seeds=self.seeds,
                         depths=depths, out=self.out or Path("runs") / f"compare-{self.config.stem}")
        notice_arms(plan.arms, settings)
        return compare(plan, jobs=self.jobs, placement=placement)


@dataclass
class Plot(Verb):
    """Draw the depth curves of evaluated runs in one picture, the trained depths shaded, and print them as a table.

    Each difficulty of a task has a curve of its own, and so has each checkpoint or setting that was evaluated.
    """

    runs: Positional[tuple[Path, ...]]
    """folders of runs that `looped eval` has measured"""
    out: Path = Path("depth.png")
    """the picture: PNG, SVG or PDF; the table is written beside it as Markdown"""
    metric: str | None = None
    """what to draw: any figure of eval/depth.jsonl with a depth, or a noise level; nats_per_token of text, solved of a
    task, accuracy or frechet_distance of images if not given"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "plot")
        if not self.runs:
            raise UserError("plot needs the folder of at least one run; see looped plot --help")
        from looped.evaluation.report import plot_runs

        print(plot_runs(self.runs, self.out, metric=self.metric))
        print(f"\n{self.out}")


@dataclass
class Info(Verb):
    """Versions, devices, and which attention backends can run and why not; or what a run or a config is."""

    target: Positional[Path | None] = None
    """a run's folder or a YAML file; nothing describes the machine"""

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
            print(_costs(config), *unread_in(load_config(self.target), config, settings), sep="\n")


def _print_cautions(config: Config) -> None:
    """The warnings on its loop that a run of the config begins with."""
    from looped.objectives.state_norm import cautions

    for caution in cautions(config):
        print(f"warning: {caution}")


def _costs(config: Config) -> str:
    """Parameters, FLOPs and memory; of the text only a tokenizer that is to be loaded is read."""
    from looped.data.opening import vocab_size_of
    from looped.objectives.counts import count, format_counts

    return format_counts(count(config, vocab_size_of(config)))


def _describe_machine() -> None:
    import platform

    import torch

    from looped.devices import DTYPES, Placement, devices_here
    from looped.nn.attention import available_backends
    from looped.training.runs import versions

    print(f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    print("  ".join(f"{name} {version or 'missing'}" for name, version in versions().items()))
    for name in reversed(devices_here()):
        place = Placement(torch.device(name), "fp32" if name == "cpu" else "bf16")
        print(place.name)
        for backend, reason in available_backends(name, DTYPES[place.dtype]).items():
            print(f"  attention {backend}: {f'no, {reason}' if reason else 'yes'}")


def _describe_run(path: Path) -> None:
    from looped.training.checkpoint import list_checkpoints
    from looped.training.runs import load_run, read_stamp

    run, stamp = load_run(path), read_stamp(path)
    print(f"{path}: {run.config.objective}, {sum(p.numel() for p in run.objective.parameters()):,} parameters, "
          f"step {run.step} of {run.config.training.budget} {run.config.training.budget_unit}")
    if run.config.blocks.num > 1:
        alone = run.config.blocks.alone
        here = ", of which a solver step runs one" * run.config.denoises
        print(f"a core of {run.config.blocks.num} blocks of {', '.join(map(str, run.config.block_layers))} layers"
              + (here if alone is None else f", of which block {alone} alone is here"))
    print(f"started {stamp.get('created')} by {' '.join(map(str, stamp.get('argv', [])))}")
    if run.identity.facts:
        given = ", given in Python" * run.identity.given
        print("data: " + ", ".join(f"{name} {value}" for name, value in run.identity.facts.items()) + given)
    print("checkpoints: " + ", ".join(folder.name for folder in list_checkpoints(path)))


VERBS: dict[str, type[Verb]] = {"train": Train, "merge": Merge, "eval": Eval, "generate": Generate, "bench": Bench,
                                "compare": Compare, "plot": Plot, "info": Info}


def print_settings() -> None:
    """Every setting with its default and what it does."""
    print("\nsettings, as --name value or in the YAML file (default in brackets):\n")
    for name, default, description in describe_settings():
        print(f"  --{name} [{default}]\n        {description}")
