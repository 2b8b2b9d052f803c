"""Tables 1 and 6 of DiffusionBlocks (arXiv 2506.14202): one classifier of images, trained from end to end, block by
block, by NoProp's three rules (arXiv 2503.24322) and by Forward-Forward (arXiv 2212.13345), at equal layer forwards.

    python scripts/reproduce/classifier_tables.py --scale cpu --images.path FASHION   # under an hour on two cores
    python scripts/reproduce/classifier_tables.py --scale cpu --sets digits           # scikit-learn's images alone
    python scripts/reproduce/classifier_tables.py --scale paper                       # CIFAR-100, 12 layers: a GPU

After the million layer forwards of `cpu` the end-to-end net, which needs fewer steps, is ahead of the blocks; with
`--layer-forwards 10000000`, an hour of one thread for these two on Fashion-MNIST, it is not. FASHION is the folder of
Fashion-MNIST's four IDX files. Each set of images is a `looped compare` in a folder of its own; after each,
classifier_tables.md is written anew. The same command again goes on where it was interrupted. Any setting of `looped
train` but the learning rate, which is each arm's own, can be added, as in --model.width 32.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import chosen, compare_command, parser_of, read_rows, run_script, spread_of

from looped.compare.budgets import AtEqual, amount
from looped.compare.cells import mean_cell
from looped.config import load_config
from looped.config.arms import parse_arms
from looped.errors import UserError
from looped.reports.markdown import markdown_table

BASE = Path(__file__).resolve().parents[2] / "configs" / "digits-denoise.yaml"
"""What the settings below are changes to."""
TABLE = "classifier_tables.md"
BUDGETS = ("layer_forwards", "seconds")


@dataclass(frozen=True)
class Rule:
    """`arm`: the objective with what it needs. `lr`: its learning rate. `vit`, `cnn`: accuracy on CIFAR-100 in tables 1
    and 6, in percent."""

    arm: str
    lr: float
    vit: float | None = None
    cnn: float | None = None


LOG_NORMAL = ("blockwise blocks.num=3 denoise.noise.distribution=log-normal denoise.noise.log_mean=2.0 "
              "denoise.noise.log_std=0.8 denoise.noise.sigma_min=2.0 denoise.noise.sigma_max=40.0")
"""Under a log-uniform density both partitions are the same. Around sigma = 3 a label is half hidden: below 1 the noisy
label names the class by itself, and a block that has such levels alone learns nothing of images."""

# Learning rates of the first three: the best on 6,000 training images of Fashion-MNIST that were held out, after a
# million layer forwards, seed 0: end to end 2e-3 .866, 3e-3 .859; blocks 2e-3 .852, 3e-3 .854, and with levels that
# begin at 3 or 4 .850 and .853. Of the others: the best on the digits, seed 0, after 150,000, or 400,000 for noprop-ct
# and noprop-fm, which are at chance before.
RULES = {
    "end-to-end": Rule("ar blocks.num=3", 2e-3, vit=60.25, cnn=47.80),
    "blockwise": Rule(f"{LOG_NORMAL} blocks.partition=mass", 2e-3, vit=59.30, cnn=46.88),
    "blockwise-uniform": Rule(f"{LOG_NORMAL} blocks.partition=log-uniform", 2e-3),
    "noprop-dt": Rule("noprop-dt blocks.num=3", 1e-2, cnn=46.06),  # 3e-3 .67, 1e-2 .79, 2e-2 .50
    "noprop-ct": Rule("noprop-ct", 3e-3, cnn=21.31),  # 3e-3 .46, 1e-2 .11; 5e-3 .24 by its posterior
    "noprop-fm": Rule("noprop-fm", 3e-3, cnn=37.57),  # 3e-3 .68, 5e-3 .19, 1e-2 .08
    "forward-forward": Rule("forward-forward model.injection=none", 1e-2, vit=7.85),  # 3e-3 .49, 1e-2 .68, 2e-2 .64
}

DEEPEST = 30
"""Most solver steps that are measured: the rules in continuous time have no number of their own."""


@dataclass(frozen=True)
class Scale:
    """`layer_forwards`: of training of each run. `flags`: settings of all arms. `sets`: images -> their settings."""

    layer_forwards: int
    flags: Mapping[str, Any]
    sets: Mapping[str, Mapping[str, Any]]


VIT = {"model.num_prelude_layers": 0, "model.num_coda_layers": 0, "training.num_evals": 4, "training.budget": 1,
       "evaluation.depths": [3, 6]}
SCALES = {
    # By the processor's time, other programs on the machine do not decide who has done more.
    "cpu": Scale(1_000_000, VIT | {"model.num_core_layers": 6, "training.threads": 1, "training.clock": "processor"}, {
        "digits": {"images.source": "digits"},
        "fashion": {"images.source": "idx", "images.max_heldout": 1000, "model.patch_size": 7,
                    "evaluation.batch_size": 100}}),
    # 50,000 images; an epoch of the end-to-end arm is 1.8 million layer forwards.
    "paper": Scale(360_000_000, VIT | {
        "model.num_core_layers": 12, "model.width": 384, "model.num_heads": 6, "model.ffn_width": 1024,
        "training.batch_size": 128, "training.precision": "bf16", "training.threads": None}, {
        "cifar100": {"images.source": "dataset", "images.dataset": "uoft-cs/cifar100", "images.image_field": "img",
                     "images.label_field": "fine_label", "images.flip": True, "images.randaugment": True,
                     "model.patch_size": 4, "evaluation.batch_size": 200}}),
}


def main() -> int:
    parser = parser_of("classifier_tables", __doc__, SCALES)
    parser.add_argument("--sets", help="images, by their names in the table; all of the scale if not given")
    parser.add_argument("--rules", default=",".join(RULES), help="lines of the table; all if not given")
    parser.add_argument("--layer-forwards", type=int, help="of training of each run; those of the scale if not given")
    parser.add_argument("--deepest", type=int, default=DEEPEST,
                        help=f"solver steps that are measured beside 3 and 6; {DEEPEST} if not given")
    return run_script("classifier_tables", parser, reproduce, own=["optim.lr"])


def reproduce(args: argparse.Namespace, settings: dict[str, str]) -> int:
    """One comparison after another, the table after each; the exit code of the last that was not 0. Raises UserError
    before anything is trained."""
    scale, out = SCALES[args.scale], args.out
    rules = chosen(args.rules, RULES)
    names = chosen(args.sets or ",".join(scale.sets), scale.sets)
    flags = {name: flags_of(scale, name, settings) for name in names}
    for name in names:
        parse_arms(load_config(BASE, flags[name]), arms_text(rules))
    results, last = {}, 0
    for name in names:
        code = subprocess.run(command_of(name, rules, flags[name], args, out / name), check=False).returncode
        if code >= 128 or code < 0:  # it was stopped
            return code
        last = code or last
        results[name] = read_rows(out / name / "compare.jsonl") if code == 0 else []
        out.mkdir(parents=True, exist_ok=True)
        (out / TABLE).write_text(report(results, rules, args.seeds) + "\n", encoding="utf-8", newline="")
    print((out / TABLE).read_text(encoding="utf-8"), end="")
    return last


def flags_of(scale: Scale, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that all arms share, those of the user above the others. The pointer to files is for the images that
    have any. Raises UserError where it is missing."""
    flags = {"objective": "ar", **scale.flags, **scale.sets[name], **settings}
    if flags["images.source"] != "idx":
        flags.pop("images.path", None)
    elif "images.path" not in flags:
        raise UserError(f"{name} needs the folder of its IDX files; give --images.path, or leave {name} out of --sets")
    return flags


def arms_text(rules: Sequence[str]) -> str:
    """The rules as named arms of `looped compare`."""
    return ",".join(f"{rule}={RULES[rule].arm} optim.lr={RULES[rule].lr}" for rule in rules)


def command_of(name: str, rules: Sequence[str], flags: Mapping[str, Any], args: argparse.Namespace,
               out: Path) -> list[str]:
    """`looped compare` on a set of images."""
    options = {"objectives": arms_text(rules), "budget": "layer-forwards", "seeds": args.seeds, "jobs": args.jobs,
               "amount": args.layer_forwards or SCALES[args.scale].layer_forwards, "out": out,
               "depths": f"3,6,{args.deepest}"}
    return compare_command(BASE, options, flags)


# ---- the table -------------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Sequence[Mapping[str, Any]]], rules: Sequence[str], num_seeds: int) -> str:
    """Markdown: a line a rule, two columns a set of images, the papers' figures beside them, what they mean."""
    header = ["rule", *(column for name in results for column in (f"{name}: best depth", f"{name}: at equal seconds")),
              "ViT, table 1", "CNN, table 6"]
    lines = [[rule, *(cell for rows in results.values() for cell in cells(rows, rule)),
              published(RULES[rule].vit), published(RULES[rule].cnn)] for rule in rules]
    spent = [f"{name}: {equal_budgets(rows)}." for name, rows in results.items() if rows]
    return "\n\n".join(["# One classifier, trained in parts", markdown_table(header, lines), *meaning(num_seeds),
                        *spent, "\n".join(f"- {rule}: `{RULES[rule].arm} optim.lr={RULES[rule].lr}`"
                                          for rule in rules)])


def cells(rows: Sequence[Mapping[str, Any]], rule: str) -> tuple[str, str]:
    """(`0.912 ± 0.013 (6)` after training, its depth in brackets; the share at equal seconds)."""
    own = [row for row in rows if row.get("arm") == rule]
    best = next((row for row in own if row["kind"] == "share" and row["at"] == "best"), None)
    equal = next((row for row in own if row["kind"] == "equal" and row["budget"] == "seconds"), None)
    if best is None or equal is None:
        return "not finished", "not finished"
    trained = sum(row["kind"] == "cost" for row in own)
    at = AtEqual(rule, "seconds", equal["spent"], spread_of(equal), trained).cell
    return f"{mean_cell(spread_of(best))} ({best['depth']})", at


def equal_budgets(rows: Sequence[Mapping[str, Any]]) -> str:
    """`400,000 layer forwards, 35 seconds`: what is equal between the arms."""
    found = {row["budget"]: amount(row["spent"]) for row in rows if row["kind"] == "equal"}
    return ", ".join(f"{found[budget]} {budget.replace('_', ' ')}" for budget in BUDGETS if budget in found)


def published(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f} %"


def meaning(num_seeds: int) -> list[str]:
    return [
        f"Accuracy on held-out images, mean ± standard deviation over {num_seeds} seed{'s' * (num_seeds > 1)}, when "
        f"each run has spent the same layer forwards (a backward pass counts two). best depth: chosen on one half of "
        f"the images and reported on the other, the depth in brackets: solver steps, passes through all blocks, or "
        f"layers that are asked under forward-forward. At equal seconds: of what each run had spent when the fastest "
        f"was done, at the best of the depths that are measured while training goes on, and so a little too good.",
        "The last two columns are the papers', on CIFAR-100 at their own sizes and budgets: to compare the direction "
        "with, not the figures."]


if __name__ == "__main__":
    sys.exit(main())
