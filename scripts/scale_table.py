"""Tables of runs on several processes: their weights beside one process's, runs resumed on more, and what is sent.

    python scripts/scale_table.py --out runs/scale
    python scripts/scale_table.py --parts rules --double     # in float64: the differences that are rounding vanish

Models of width 32 in processes of one thread over gloo on the CPU, with the whole batch divided among them. A
difference is the greatest one of any weight, and relative to the greatest way that any weight has gone from its start.
Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from looped.config import load_config
from looped.config.rules import RULES, Rule
from looped.training.checkpoint import list_checkpoints
from looped.training.train import open_trainer
from looped.training.trainer import Trainer

COMMON = {
    "model.width": 32, "model.num_heads": 2, "model.num_prelude_layers": 1, "model.num_core_layers": 1,
    "model.num_coda_layers": 1, "recurrence.mean": 3, "recurrence.backprop": 2, "denoise.cond_width": 8,
    "denoise.target.dim": 4, "optim.warmup_steps": 5, "optim.ema_decay": 0.9, "training.batch_size": 8,
    "training.threads": 1, "training.precision": "fp32", "training.checkpoint_every": 0, "evaluation.num_samples": 1}
DIGITS = {"images.source": "digits", "images.max_train": 64, "images.max_heldout": 16, "model.patch_size": 4,
          "denoise.context": "inject"}
OF_KIND = {
    "text": {"data.vocab_size": 270, "data.length": 16, "evaluation.num_sequences": 4, "evaluation.prompt_length": 4,
             "evaluation.sample_length": 4},
    "classify": DIGITS,
    "generate": DIGITS | {"images.goal": "generate", "denoise.weight": "edm", "model.injection": "none",
                          "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.num_core_layers": 2,
                          "evaluation.num_images": 4},
}
TWO_BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2}
OF_RULE = {"blockwise": TWO_BLOCKS, "noprop-dt": TWO_BLOCKS,
           "forward-forward": {"model.num_core_layers": 2, "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
                               "model.injection": "none"}}
SHARDS = {"DDP": "none", "FSDP": "fsdp"}
RESUMED = ("denoise", "truncated", "blockwise")
DEPTHS = (6, 24, 96)
NUM_STEPS = 20
PART = 10
"""Steps of each part of a run that is resumed."""


# ----------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """Training of a run up to a step of its budget, in as many processes as its launcher has."""

    run: str
    settings: dict[str, Any]
    until: int

    @property
    def folder(self) -> Path:
        return Path(self.run)

    def first(self) -> dict[str, torch.Tensor]:
        """The weights at the start."""
        return load_file(self.folder / "start.safetensors")

    def last(self, name: str = "model") -> dict[str, torch.Tensor]:
        """The tensors of a file of the newest checkpoint."""
        return load_file(list_checkpoints(self.folder)[0] / f"{name}.safetensors")

    def sent(self) -> list[list[int]]:
        """[number, bytes] of the all-gathers and of the reduce-scatters of the last part's first step."""
        return json.loads((self.folder / "sent.json").read_text(encoding="utf-8"))


class Exchange:
    """A collective of FSDP2 that counts, inside its block, its calls and the bytes of the whole tensors."""

    def __init__(self, name: str):
        self.name = name
        self.plain: Callable[..., Any] = getattr(dist, name)
        self.sizes: list[int] = []

    def __enter__(self) -> "Exchange":
        setattr(dist, self.name, self)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(dist, self.name, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        self.sizes.append(max(tensor.nbytes for tensor in given))  # of the whole and a part, one in and the other out
        return self.plain(*args, **kwargs)

    def taken(self) -> list[int]:
        """[number, bytes] since the last time."""
        sizes, self.sizes = self.sizes, []
        return [len(sizes), sum(sizes)]


def work(jobs: list[Job], *, double: bool) -> None:
    """Train one run after another, in this process of a launcher."""
    if double:
        plain = Trainer.new_objective
        Trainer.new_objective = lambda self: plain(self).double()
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # where a rule asks for float32 in a run of bf16
    for job in jobs:
        with ExitStack() as stack:
            exchanges = [stack.enter_context(Exchange(name)) for name in ("all_gather_single", "reduce_scatter_single")]
            trainer = stack.enter_context(open_trainer(load_config(None, job.settings), job.folder, quiet=True))
            weights = trainer.layout.model_tensors(trainer.objective)
            if trainer.done.step == 0 and trainer.processes.is_first:
                save_file({name: tensor.clone() for name, tensor in weights.items()}, job.folder / "start.safetensors")
            for exchange in exchanges:
                exchange.taken()
            trainer.train_step()
            sent = [exchange.taken() for exchange in exchanges]
            while trainer.done.step < job.until:
                trainer.train_step()
            if trainer.processes.is_first:
                (job.folder / "sent.json").write_text(json.dumps(sent), encoding="utf-8", newline="")


def launch(jobs: list[Job], num: int, options: argparse.Namespace) -> None:
    """Train runs in `num` processes."""
    file = options.out / "jobs.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8", newline="")
    launcher = [] if num == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
    command = [sys.executable, *launcher, __file__, "--jobs", str(file), *["--double"] * options.double]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}, check=False,
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{num} processes ended with code {done.returncode}:\n{done.stderr[-4000:]}")


# ----------------------------------------------------------------------------- comparisons


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The greatest difference of any number."""
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def compared(job: Job, other: Job) -> str:
    """The difference of two runs' weights, and that relative to the way of the second."""
    apart = difference(job.last(), other.last())
    return f"{apart:.1e} | {apart / difference(other.last(), other.first()):.1e}"


def equal_bits(job: Job, other: Job) -> bool:
    """True if weights, averages and moments are equal bit for bit."""
    return all(torch.equal(tensor, other.last(file)[name]) for file in ("model", "ema", "optimizer")
               for name, tensor in job.last(file).items())


# ----------------------------------------------------------------------------- tables


def settings_of(options: argparse.Namespace, rule: str, kind: str, **changes: Any) -> dict[str, Any]:
    text = {"data.path": [str(options.out / "text.txt")], "data.cache_dir": str(options.out / "tokens")}
    own = dict(each.split("=", 1) for each in options.set)
    return COMMON | OF_KIND[kind] | text | {"objective": rule} | OF_RULE.get(rule, {}) | changes | own


def kinds_of(rule: Rule) -> Iterable[str]:
    """The kinds of data on which a rule is tried: its first, and those for which it has a class of its own."""
    return dict.fromkeys((rule.kinds[0], *rule.paths))


def rules_table(options: argparse.Namespace) -> Iterable[str]:
    """Lines of the table of every rule: two processes beside one."""
    cases = [(rule.name, kind) for rule in RULES.values() for kind in kinds_of(rule)
             if options.rules is None or rule.name in options.rules]

    def jobs(arm: str, shard: str = "none") -> list[Job]:
        return [Job(str(options.out / f"{rule}-{kind}-{arm}"), settings_of(
            options, rule, kind, **{"training.budget": NUM_STEPS, "training.shard": shard}), NUM_STEPS)
            for rule, kind in cases]

    launch(one := jobs("one"), 1, options)
    arms = {arm: jobs(arm, shard) for arm, shard in SHARDS.items()}
    for runs in arms.values():
        launch(runs, 2, options)
    yield "| rule | data | way | DDP, 2 | relative | FSDP, 2 | relative |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for place, (rule, kind) in enumerate(cases):
        way = difference(one[place].last(), one[place].first())
        yield f"| `{rule}` | {kind} | {way:.1e} | " + " | ".join(
            compared(runs[place], one[place]) for runs in arms.values()) + " |"


def resumed_table(options: argparse.Namespace) -> Iterable[str]:
    """Lines of the table of resumed runs: two processes after two, and two and four after one."""
    lines = {}
    rules = [rule for rule in RESUMED if options.rules is None or rule in options.rules]

    def jobs(arm: str, until: int, budget: int, shard: str = "none") -> list[Job]:
        return [Job(str(options.out / f"{rule}-{arm}"), settings_of(
            options, rule, "text", **{"training.budget": budget, "training.shard": shard}), until) for rule in rules]

    launch(one := jobs("alone", 3 * PART, 3 * PART), 1, options)
    for arm, shard in SHARDS.items():
        launch(undisturbed := jobs(f"{arm}-whole", 2 * PART, 2 * PART, shard), 2, options)
        for until in (PART, 2 * PART):
            launch(twice := jobs(f"{arm}-twice", until, 2 * PART, shard), 2, options)
        for num in (1, 2, 4):
            launch(grown := jobs(f"{arm}-grown", {1: 1, 2: 2, 4: 3}[num] * PART, 3 * PART,
                                 "none" if num == 1 else shard), num, options)
        for place, rule in enumerate(rules):
            same = "bit-equal" if equal_bits(twice[place], undisturbed[place]) else \
                f"**{difference(twice[place].last(), undisturbed[place].last()):.1e}**"
            lines[rule, arm] = f"| `{rule}` | {arm} | {same} | {compared(grown[place], one[place])} |"
    yield "| rule | | 2, then 2 | 1, 2, then 4 | relative |"
    yield "|---|---|---:|---:|---:|"
    yield from (lines[rule, arm] for rule in rules for arm in SHARDS)


def sent_table(options: argparse.Namespace) -> Iterable[str]:
    """Lines of the table of what a sharded step exchanges, by depth."""
    loops = [rule for rule in ("full", "truncated") if options.rules is None or rule in options.rules]
    jobs = [Job(str(options.out / f"{rule}-depth{depth}"), settings_of(
        options, rule, "text", **{"training.budget": 1, "training.shard": "fsdp", "recurrence.mean": depth,
                                  "recurrence.distribution": "fixed"}), 1) for rule in loops for depth in DEPTHS]
    launch(jobs, 2, options)
    yield "| rule | loop steps | all-gathers | bytes | reduce-scatters | bytes |"
    yield "|---|---:|---:|---:|---:|---:|"
    for job in jobs:
        (gathers, gathered), (scatters, scattered) = job.sent()
        yield (f"| `{job.settings['objective']}` | {job.settings['recurrence.mean']} | {gathers} | {gathered:,} | "
               f"{scatters} | {scattered:,} |")


TABLES = {"rules": rules_table, "resumed": resumed_table, "sent": sent_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="a folder, which must be new")
    parser.add_argument("--parts", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=None)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all runs")
    parser.add_argument("--double", action="store_true", help="train in float64")
    parser.add_argument("--jobs", type=Path, default=None, help=argparse.SUPPRESS)  # of a process that is launched
    options = parser.parse_args()
    if options.jobs is not None:
        work([Job(**job) for job in json.loads(options.jobs.read_text(encoding="utf-8"))], double=options.double)
        return
    options.out = options.out.resolve()
    options.out.mkdir(parents=True)
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}\n\n" for i in range(400))
    (options.out / "text.txt").write_text(text, encoding="utf-8", newline="")
    for part in options.parts:
        print(*TABLES[part](options), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
