"""Which training rule buys depth on which task: every rule on every task at equal seconds and equal layer forwards.

    python scripts/reproduce/depth_tasks.py --scale cpu      # 2.5 hours of training on two cores, and evaluations
    python scripts/reproduce/depth_tasks.py --scale cpu --tasks sudoku4,maze --seconds 60 --seeds 1
    python scripts/reproduce/depth_tasks.py --scale paper    # width 512: a GPU, and days

Each task is a `looped compare` in a folder of its own; after each, depth_tasks.md is written anew. The same command
again goes on where it was interrupted. What is set for each task is in `TASKS`, for each rule in `RULES`, and any
setting of `looped train` but the learning rate can be added for all of them, as in --model.width 32.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import chosen, compare_command, parser_of, read_rows, run_script, spread_of

from looped.compare.budgets import AtEqual, amount
from looped.compare.cells import mean_cell
from looped.config import load_config
from looped.config.arms import Arm, parse_arm
from looped.data.problems import prepare_task
from looped.errors import UserError
from looped.reports.markdown import markdown_table

BASE = Path(__file__).resolve().parents[2] / "configs" / "sudoku4-denoise.yaml"
"""What the settings below are changes to."""
TABLE = "depth_tasks.md"
EQUAL = ("seconds", "layer_forwards")
"""Budgets of the table: what a user waits for, and what no machine changes."""
BEYOND = {"best": "best depth", "deepest": "deepest"}
"""Depths of the tables beyond training, by the name that rows have for them."""


@dataclass(frozen=True)
class Rule:
    """`arm`: the objective, and what it needs on any task. `lr`: its learning rate."""

    arm: str
    lr: float


RULES = {
    "full": Rule("full model.state_init=zero recurrence.loss_on=every", 4e-3),
    # One depth a batch, since a loss on every step needs it.
    "truncated": Rule("truncated model.state_init=zero recurrence.loss_on=every recurrence.backprop=4 "
                      "recurrence.per_sequence=false", 4e-3),
    "progressive": Rule("progressive model.state_init=zero recurrence.progressive_weight=0.5", 4e-3),
    "one-step": Rule("one-step model.state_init=zero", 2e-3),
    # Plain steps from a fixed point that Anderson's method has found can cycle around it; damped ones reach it.
    "fixed-point": Rule("fixed-point model.state_init=zero recurrence.damping=0.3", 4e-3),
    "denoise": Rule("denoise", 4e-3),
    # The order by confidence is for one step; where all cells fall together, every level has to be trained.
    "k-step": Rule("denoise denoise.train_steps=2 denoise.order=together denoise.noise.share_at_max=0.5", 4e-3),
    "ar": Rule("ar", 4e-3),  # the same layers in one pass: what there is without depth
}


@dataclass(frozen=True)
class Setup:
    """One line of the table. `seconds` of training on a CPU. `window`, `options`: of the task. `depths`: that are
    measured after training, and `curve` while it goes on. `rate`: what every rule's learning rate is multiplied by.
    `flags`: further settings, above `SMALL`."""

    name: str
    seconds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None
    curve: tuple[int, ...] = (1, 8, 16)
    depths: tuple[int, ...] = (1, 8, 16, 32)
    rate: float = 1.0
    flags: Mapping[str, Any] = field(default_factory=dict)


SMALL = {"model.width": 64, "model.ffn_width": 128, "model.num_coda_layers": 0, "model.rope_base": 100,
         "recurrence.mean": 8, "training.num_evals": 8, "evaluation.num_problems": 128}
"""A layer before the loop and two inside, for all rules."""
WIDE = {"model.width": 128, "model.ffn_width": 512}
WORDS = {"denoise.evidence_in": True}
"""Of the many elements of a group a denoiser learns little from the few dimensions of its targets: what has settled is
shown to it as the elements of the word are, by embeddings of full width."""
FEW_LOOKS = {"training.batch_size": 32, "training.num_evals": 4}
"""Where a look at the held-out problems takes as long as a tenth of the training."""

TASKS = {
    "prefix-sums": Setup("prefix-sums", 60, window=2, depths=(1, 8, 16, 32, 64)),
    "addition": Setup("addition", 60, {"columns": True}, window=2, curve=(1, 9, 16), depths=(1, 9, 17, 34)),
    "copy": Setup("copy", 60, {"columns": True}, window=2, depths=(1, 8, 20, 40)),
    "parity": Setup("parity", 60),
    "nary-addition": Setup("nary-addition", 60, {"columns": True}),
    "sudoku4": Setup("sudoku", 60, {"size": 4}, curve=(1, 10, 20), depths=(1, 4, 10, 20, 40)),
    "s5": Setup("s5", 60, {"moved": 2}, window=2, depths=(1, 8, 16, 32, 64), flags=WORDS),
    "a5": Setup("a5", 60, {"moved": 3}, window=2, depths=(1, 8, 16, 32, 64), flags=WORDS),
    "p-hop": Setup("p-hop", 30, {"every": True}, flags=FEW_LOOKS | {"model.rope_base": 10_000}),
    "maze": Setup("maze", 100, window=2, curve=(1, 40), depths=(1, 10, 40, 80),
                  flags=FEW_LOOKS | {"evaluation.difficulties": [9, 13]}),
    "sudoku6": Setup("sudoku", 80, {"size": 6}, curve=(1, 24), depths=(1, 8, 24), rate=0.5,
                     flags=WIDE | FEW_LOOKS | {"training.batch_size": 64, "evaluation.difficulties": [24, 26]}),
    # 41 clues and more: a minute of the hardest teaches nobody anything.
    "sudoku9": Setup("sudoku", 60, {"size": 9}, curve=(1, 51), depths=(1, 13, 51), rate=0.5,
                     flags=WIDE | FEW_LOOKS | {"task.difficulty": [20, 40], "evaluation.difficulties": [40, 51],
                                               "evaluation.num_problems": 64}),
}


@dataclass(frozen=True)
class Scale:
    """`seconds`: of training, None for those of each task. `flags`: settings of every task, above those of its own."""

    seconds: int | None
    flags: Mapping[str, Any]


SCALES = {
    # By the processor's time, other programs on the machine do not decide who has done more.
    "cpu": Scale(None, {"training.threads": 1, "training.clock": "processor"}),
    "paper": Scale(3600, {"model.width": 512, "model.ffn_width": None, "model.num_heads": 8, "training.batch_size": 512,
                          "training.precision": "bf16", "training.threads": None, "evaluation.num_problems": 1024}),
}


def main() -> int:
    parser = parser_of("depth_tasks", __doc__, SCALES)
    parser.add_argument("--tasks", default=",".join(TASKS), help="lines of the table; all if not given")
    parser.add_argument("--rules", default=",".join(RULES), help="its columns; all if not given")
    parser.add_argument("--seconds", type=int, help="of training of each run; those of the scale if not given")
    return run_script("depth_tasks", parser, reproduce, own=["optim.lr"])


def reproduce(args: argparse.Namespace, settings: dict[str, str]) -> int:
    """One comparison after another, the table after each; the exit code of the last that was not 0. Raises UserError
    before anything is trained."""
    out, scale = args.out, SCALES[args.scale]
    rules = chosen(args.rules, RULES)
    entries = [make_entry(task, rules, scale, settings, out) for task in chosen(args.tasks, TASKS)]
    results, last = [], 0
    for entry in entries:
        code, result = run_compare(entry, args, scale)
        if code >= 128:  # it was stopped
            return code
        last = code or last
        results.append(result)
        out.mkdir(parents=True, exist_ok=True)  # where no rule applies, no comparison has made it
        (out / TABLE).write_text(report(results, rules) + "\n", encoding="utf-8", newline="")
    print((out / TABLE).read_text(encoding="utf-8"), end="")
    return last


# ---- one task --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    """One task with what its comparison is given: rule -> its arm, or why the rule does not apply (`refused`).
    `difficulty`: what that counts, `high` the hardest that is trained; nothing where the task itself is refused."""""

    task: str
    out: Path
    flags: Mapping[str, Any]
    arms: Mapping[str, Arm]
    refused: Mapping[str, str]
    difficulty: str = ""
    high: int | None = None


def make_entry(task: str, rules: Sequence[str], scale: Scale, settings: Mapping[str, Any], out: Path) -> Entry:
    """The comparison of a task. Raises UserError for settings that are none; what only a rule or the task refuses is
    noted."""
    setup = TASKS[task]
    flags = flags_of(setup, scale) | settings
    config = load_config(BASE, flags)
    common = {"task": task, "out": out / task, "flags": flags}
    try:
        data = prepare_task(config.task)
    except UserError as error:
        return Entry(**common, arms={}, refused=dict.fromkeys(rules, str(error)))
    arms, refused = {}, {}
    for rule in rules:
        try:
            arms[rule] = parse_arm(config, arm_text(rule, setup))
        except UserError as error:
            refused[rule] = str(error).removeprefix(f"arm '{rule}': ")
    return Entry(**common, arms=arms, refused=refused, difficulty=data.task.difficulty, high=data.train.high)


def flags_of(setup: Setup, scale: Scale) -> dict[str, Any]:
    """Settings that all rules share. The objective is that of no arm: a rule that the config itself names would be
    checked with it, and refused for all."""
    return {"objective": "full", "task.name": setup.name, "task.options": dict(setup.options), "task.difficulty": None,
            "task.window": setup.window, "evaluation.depths": list(setup.curve), **SMALL, **setup.flags, **scale.flags}


def arm_text(rule: str, setup: Setup) -> str:
    """The rule as an arm of `looped compare`, which calls it by the rule's name."""
    return f"{rule}={RULES[rule].arm} optim.lr={RULES[rule].lr * setup.rate:g}"


def command_of(entry: Entry, args: argparse.Namespace, scale: Scale) -> list[str]:
    """`looped compare` of a task."""
    setup = TASKS[entry.task]
    options = {"objectives": ",".join(arm_text(rule, setup) for rule in entry.arms), "budget": "seconds",
               "amount": args.seconds or scale.seconds or setup.seconds, "seeds": args.seeds, "jobs": args.jobs,
               "out": entry.out, "depths": ",".join(map(str, setup.depths))}
    return compare_command(BASE, options, entry.flags)


def run_compare(entry: Entry, args: argparse.Namespace, scale: Scale) -> tuple[int, "Result"]:
    """(exit code, what is known of the task). A comparison that refuses leaves the rows of an earlier one as they are,
    which are not this one's: they are taken only where they were written now, or where it has succeeded."""
    if not entry.arms:
        return 0, Result(entry, [], args.seeds)
    print(f"\n{entry.task}: {', '.join(entry.arms)}", flush=True)
    rows = entry.out / "compare.jsonl"
    before = rows.stat().st_mtime_ns if rows.exists() else None
    code, said = wait_for(command_of(entry, args, scale))
    print(said, end="", file=sys.stderr)
    fresh = code == 0 or (rows.exists() and rows.stat().st_mtime_ns != before)
    return code, Result(entry, read_rows(rows) if fresh else [], args.seeds, said)


def wait_for(command: list[str]) -> tuple[int, str]:
    """(exit code, what it said on stderr) of a command."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate()
    except KeyboardInterrupt:  # the child has had it too: its runs save and end
        _, said = process.communicate()
    return process.returncode, said


# ---- the tables ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Result:
    """A task with the rows of its comparison, and what that `said` on stderr."""

    entry: Entry
    rows: Sequence[Mapping[str, Any]]
    num_seeds: int
    said: str = ""

    def of(self, kind: str, rule: str, **fields: Any) -> list[Mapping[str, Any]]:
        """Rows of a kind and rule that have these fields."""
        wanted = {"kind": kind, "arm": rule, **fields}
        return [row for row in self.rows if wanted.items() <= row.items()]

    def missing(self, rule: str) -> str | None:
        """Why a rule has no figures; None where it has."""
        if rule in self.entry.refused:
            return f"does not apply: {self.entry.refused[rule]}"
        if not self.rows:
            return f"no run has finished: {last_sentence(self.said) or 'the comparison has not said why'}"
        return None if self.of("equal", rule) else self.failed(rule)

    def failed(self, rule: str) -> str | None:
        """Which of its seeds have not finished, and what the log of the first of them ends with; None where all have.
        """
        finished = {row["seed"] for row in self.of("cost", rule)}
        seed = next((seed for seed in range(self.num_seeds) if seed not in finished), None)
        if seed is None:
            return None
        log = self.entry.out / "logs" / f"{self.entry.arms[rule].slug}-{seed}.log"
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return f"{len(finished)} of {self.num_seeds} seeds have finished: {last_sentence(said) or f'see {log}'}"

    def spent(self, budget: str) -> str | None:
        """The equal budget of the line."""
        return next((amount(row["spent"]) for row in self.rows
                     if (row["kind"], row.get("budget")) == ("equal", budget)), None)

    def equal_cell(self, rule: str, notes: "Footnotes") -> str:
        """`0.912 ± 0.013; 0.874 ± 0.020`: at each of `EQUAL`."""
        found = [self.of("equal", rule, budget=budget)[0] for budget in EQUAL]
        trained, failed = len(self.of("cost", rule)), self.failed(rule)
        cells = [AtEqual(rule, row["budget"], row["spent"], spread_of(row), trained).cell for row in found]
        return "; ".join(cells) + (f" {notes.mark(failed)}" if failed else "")

    @property
    def beyond(self) -> list[int]:
        """Difficulties that were measured and are harder than any that was trained."""
        levels = {row["difficulty"] for row in self.rows if row["kind"] == "share"}
        return sorted(level for level in levels if level > self.entry.high)

    def share_cells(self, rule: str) -> list[str]:
        """`0.912 ± 0.013 (8)` at each of `BEYOND` of each difficulty, the depth in brackets."""
        found = [self.of("share", rule, difficulty=level, at=at)[0] for level in self.beyond for at in BEYOND]
        return [f"{mean_cell(spread_of(row))} ({row['depth']})" for row in found]


def last_sentence(said: str) -> str | None:
    """The last error that a command of `looped` told its user; None where there is none."""
    own = [line.removeprefix("looped: ") for line in said.splitlines() if line.startswith("looped: ")]
    return own[-1] if own else None


class Footnotes:
    """Reasons with their numbers; one that comes again keeps its number."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def mark(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"[{self.reasons.index(reason) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {reason}" for number, reason in enumerate(self.reasons, 1)]


def report(results: Sequence[Result], rules: Sequence[str]) -> str:
    """Markdown: the table of all tasks, one of each beyond training, and what they mean."""
    notes = Footnotes()
    header = ["task", "hardest trained", "seconds", "layer forwards", *rules]
    main_table = markdown_table(header, [_line(result, rules, notes) for result in results])
    beyond = [_beyond(result, rules, notes) for result in results]
    arms = [f"{rule}: `{RULES[rule].arm}`." for rule in rules]
    return "\n\n".join(["# Which training rule buys depth on which task", main_table, *MEANING, "\n".join(
        f"- {arm}" for arm in arms), *notes.lines(), "## Beyond the trained difficulty", *beyond])


MEANING = (
    "Share of held-out problems solved at the hardest trained difficulty (higher is better), mean ± standard deviation "
    "over seeds: before the semicolon at equal seconds of training, after it at equal layer forwards (a backward pass "
    "counts two), the most that every run of every rule in the line has spent; seconds by "
    "training.clock. It is of the best of the measured depths, chosen on the same problems, and so a little too good.",
    "Beyond the trained difficulty: at the end of training, at the best depth, chosen on one half of the problems, and "
    "at the deepest that was measured; shares are of the other half, depths in brackets.",
    "The rules; learning rates, and all else that is set for a task, are in the YAML files of its folder:",
)


def _line(result: Result, rules: Sequence[str], notes: Footnotes) -> list[str]:
    entry = result.entry
    cells = [notes.mark(reason) if (reason := result.missing(rule)) else result.equal_cell(rule, notes)
             for rule in rules]
    hardest = f"{entry.difficulty} {entry.high}" if entry.difficulty else cells[0]
    return [entry.task, hardest, *(result.spent(budget) or cells[0] for budget in EQUAL), *cells]


def _beyond(result: Result, rules: Sequence[str], notes: Footnotes) -> str:
    """A line a rule; a sentence where nothing harder was measured."""
    entry = result.entry
    if not result.beyond:
        return f"{entry.task}: nothing harder than what was trained has been measured."
    header = ["rule", *(f"{level}: {name}" for level in result.beyond for name in BEYOND.values())]
    lines = []
    for rule in rules:
        reason = result.missing(rule)
        lines.append([rule, *([notes.mark(reason)] * (len(header) - 1) if reason else result.share_cells(rule))])
    return f"{entry.task}, {entry.difficulty}:\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    sys.exit(main())
