"""What tables 4 and 5 share: language models that are trained, and then judged by what they write.

Judges (perplexity) and encoder (MAUVE) are models of a hub, or, where nothing is at hand, one autoregressive run of
another seed that stands in for both.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import flag_words, parser_of, run_script

from looped.compare.cells import mean_cell
from looped.compare.summary import spread
from looped.reports.markdown import markdown_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAND_IN_SEED = 1000
"""The judge must not have the seed of a writer."""


@dataclass(frozen=True)
class Writer:
    """One line of a table. `flags`: what it is trained by, for so many of the scale's budgets. `depths`: to write at.
    `paper`: what the paper reports of it. `note`: what stands beside its name."""

    flags: Mapping[str, Any]
    budgets: int
    depths: Sequence[int]
    paper: Mapping[str, float]
    note: str = ""

    def title(self, name: str) -> str:
        """Its name in the table."""
        return f"{name}, {self.note}" if self.note else name


@dataclass(frozen=True)
class Scale:
    """`flags`: settings of every run. `budget`: counted in `unit`. `judges` and `encoder`: None for the run that stands
    in, which gets as much as the longest trained writer."""

    config: str
    flags: Mapping[str, Any]
    budget: int
    unit: str
    judges: Sequence[str] | None
    encoder: str | None


@dataclass(frozen=True)
class Table:
    """`name`: of the script. `title`: of the table. `where`: on what the paper's figures were measured."""

    name: str
    title: str
    where: str
    writers: Mapping[str, Writer]
    scales: Mapping[str, Scale]

    def main(self, doc: str | None) -> int:
        """The command line of the script with this docstring; the exit code."""
        parser = parser_of(self.name, doc, self.scales)
        parser.add_argument("--budget", type=int, help="instead of the scale's, to try it out")
        return run_script(self.name, parser, self.reproduce)

    def reproduce(self, args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
        """Train all, measure all, write the table; the first exit code that is not 0."""
        scale, out = self.scales[args.scale], args.out
        commands = [self.train(scale, args, writer, seed, out / f"{name}-{seed}", settings)
                    for name, writer in self.writers.items() for seed in range(args.seeds)]
        stand_in = out / f"ar-{STAND_IN_SEED}"
        if scale.judges is None:
            best = Writer({"objective": "ar"}, max(writer.budgets for writer in self.writers.values()), (1,), {})
            commands.append(self.train(scale, args, best, STAND_IN_SEED, stand_in, settings))
        code = run_all(commands, args.jobs)
        if code:
            return code
        judges, encoder = scale.judges or (str(stand_in),), scale.encoder or str(stand_in)
        rows = []
        for name, writer in self.writers.items():
            for seed in range(args.seeds):
                code, found = measure(out / f"{name}-{seed}", writer.depths, judges, encoder)
                if code:  # it has said why
                    return code
                rows += [{"writer": name, "seed": seed} | row for row in found]
        text = self.report(rows, judges, encoder, args.seeds)
        (out / f"{self.name}.md").write_text(text + "\n", encoding="utf-8", newline="")
        print(text)
        return 0

    def train(self, scale: Scale, args: argparse.Namespace, writer: Writer, seed: int, run: Path,
              settings: Mapping[str, Any]) -> list[str]:
        """`looped train` of one run; `settings` are those of the user."""
        budget = {"training.budget": writer.budgets * (args.budget or scale.budget), "training.budget_unit": scale.unit}
        flags = {"seed": seed, "training.eval_every": 0, **scale.flags, **writer.flags, **budget, **settings}
        return [sys.executable, "-m", "looped.cli", "train", str(CONFIGS / scale.config), "--run", str(run),
                *flag_words(flags)]

    def report(self, rows: Sequence[Mapping[str, Any]], judges: Sequence[str], encoder: str, num_seeds: int) -> str:
        """Markdown, a line a writer and depth."""
        header = ["writer", "depth", "MAUVE", *(f"perplexity, {shown(judge)}" for judge in judges), "distinct-2",
                  "held-out nats"]
        lines = [[writer.title(name), str(depth), *_cells([row for row in rows if (row["writer"], row["depth"]) == (
            name, depth)], judges)] for name, writer in self.writers.items() for depth in writer.depths]
        paper = "; ".join(f"{writer.title(name)}: " + ", ".join(f"{key} {value:g}" for key, value in
                                                                writer.paper.items())
                          for name, writer in self.writers.items())
        return "\n\n".join([
            f"# {self.title}", markdown_table(header, lines),
            f"Mean ± standard deviation over {num_seeds} seed{'s' * (num_seeds > 1)}. MAUVE (higher is better) in "
            f"features of {shown(encoder)}; perplexity (lower is better) of what is written, beside distinct-2, since "
            f"repetition has a low one; held-out nats a token are the writer's own.",
            f"The paper, {self.where}: {paper}."])


def shown(judge: str) -> str:
    """A judge in the table: a run by its folder's name."""
    return Path(judge).name if Path(judge).exists() else judge


def _cells(rows: Sequence[Mapping[str, Any]], judges: Sequence[str]) -> list[str]:
    """Of one writer at one depth, as in the header."""
    def cell(metric: str, judge: str) -> str:
        return mean_cell(spread([math.exp(row["mean"]) if metric == "judged_nats" else row["mean"] for row in rows
                                 if (row["metric"], row["judge"]) == (metric, judge)]))

    return [cell("mauve", judges[0]), *(cell("judged_nats", judge) for judge in judges),
            cell("distinct_2", judges[0]), cell("nats_per_token", judges[0])]


def run_all(commands: Sequence[list[str]], jobs: int) -> int:
    """Run the commands, so many at once; the first exit code that is not 0. Each says on the screen what it does."""
    queue, running, code = list(commands), [], 0
    try:
        while (queue and not code) or running:
            while queue and len(running) < jobs and not code:
                running.append(subprocess.Popen(queue.pop(0)))
            code = code or running[0].wait()
            running = [process for process in running if process.poll() is None]
    except KeyboardInterrupt:  # the children have had it too: they save and end
        for process in running:
            process.wait()
        return 130
    return code


def measure(run: Path, depths: Sequence[int], judges: Sequence[str], encoder: str) -> tuple[int, list[dict[str, Any]]]:
    """(exit code, {depth, metric, judge, mean} of what a run writes)."""
    rows = []
    for judge in judges:
        features = ["--mauve", encoder] if judge == judges[0] else []  # MAUVE does not depend on the judge
        done = subprocess.run([sys.executable, "-m", "looped.cli", "eval", str(run), "--depths",
                               ",".join(map(str, depths)), "--judge", judge, *features, "--json"],
                              stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode, rows
        rows += [{"depth": row["depth"], "metric": row["metric"], "judge": judge, "mean": row["mean"]}
                 for row in map(json.loads, done.stdout.splitlines())
                 if row["metric"] in ("judged_nats", "distinct_2", "mauve", "nats_per_token")]
    return 0, rows
