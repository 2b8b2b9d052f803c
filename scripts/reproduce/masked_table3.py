"""Masked diffusion in three blocks beside the same layers end to end (DiffusionBlocks, arXiv 2506.14202: MD4 on text8,
1.56 bits a character end to end, 1.45 in three blocks).

    python scripts/reproduce/masked_table3.py --scale cpu      # three quarters of an hour on one core
    python scripts/reproduce/masked_table3.py --scale paper --data.path "text8/*.txt"      # 12 layers: a GPU, and days

Both arms get the same number of layer forwards, so the blocks, which run a third of the layers in a step, take three
times the steps. `cpu` is configs/stdlib-masked.yaml on the default corpus, in bits a byte; `paper` is MD4's size on
bytes, text8 given by the user in several files, of which some are held out. It is a `looped compare`, and the same
command again goes on where it was interrupted. Any setting of `looped train` but the learning rate can be added.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import compare_command, parser_of, read_rows, run_script

from looped.compare.cells import mean_cell
from looped.compare.summary import spread
from looped.errors import UserError
from looped.reports.markdown import markdown_table

BASE = Path(__file__).resolve().parents[2] / "configs" / "stdlib-masked.yaml"
TABLE = "masked_table3.md"
ARMS = {"end-to-end": "masked blocks.num=1", "three-blocks": "masked"}
PAPER = {"end-to-end": "1.56", "three-blocks": "1.45"}
DEPTHS = (1, 8, 64)


@dataclass(frozen=True)
class Scale:
    """`layer_forwards`: of each run. `rates`: learning rates of the arms. `flags`: settings of all runs. `own_text`:
    whether the user has to give it."""

    layer_forwards: int
    rates: Mapping[str, float]
    flags: Mapping[str, Any]
    own_text: bool = False


SCALES = {
    # By the processor's time, other programs on the machine do not show in the seconds of the table.
    # Rates: nats a token at the end, seed 0: end to end 1e-3 5.25, 2e-3 5.42 (5e-4 and 4e-3 were stopped as worse); in
    # blocks 2e-3 4.53, 4e-3 5.36 (1e-3 was stopped).
    "cpu": Scale(200_000, {"end-to-end": 1e-3, "three-blocks": 2e-3}, {
        "training.threads": 1, "training.clock": "processor", "training.num_evals": 5,
        "training.checkpoint_every": 200, "evaluation.num_sequences": 64, "evaluation.levels": 16,
        "evaluation.sample_depths": [8], "evaluation.sample_length": 32}),
    # A million steps of 512 texts through 12 layers.
    "paper": Scale(10**6 * 512 * 3 * 12, dict.fromkeys(ARMS, 3e-4), {
        "model.width": 768, "model.ffn_width": 2048, "model.num_heads": 12, "model.num_core_layers": 12,
        "data.vocab_size": 257, "data.length": 256, "data.max_bytes": 10**8,
        "optim.warmup_steps": 2000, "training.batch_size": 512, "training.precision": "bf16", "training.threads": None,
        "training.num_evals": 20, "training.checkpoint_every": 5000, "evaluation.num_sequences": 1024}, own_text=True),
}


def main() -> int:
    parser = parser_of("masked_table3", __doc__, SCALES, jobs=1)
    parser.add_argument("--layer-forwards", type=int, help="of each run; those of the scale if not given")
    return run_script("masked_table3", parser, reproduce, own=["optim.lr"])


def reproduce(args: argparse.Namespace, settings: dict[str, str]) -> int:
    """The comparison, then the table; the exit code. Raises UserError before anything is trained."""
    if SCALES[args.scale].own_text and "data.path" not in settings:
        raise UserError("--scale paper needs a text of its own; give the files of text8 with --data.path")
    code = subprocess.call(command_of(args, settings))
    if code:
        return code
    rows = read_rows(args.out / "compare.jsonl")
    (args.out / TABLE).write_text(report(rows) + "\n", encoding="utf-8", newline="")
    print(f"\n{report(rows)}")
    return 0


def command_of(args: argparse.Namespace, settings: Mapping[str, Any]) -> list[str]:
    """`looped compare` of both arms; `settings` are those of the user."""
    scale = SCALES[args.scale]
    options = {"objectives": ",".join(arms_of(scale)), "budget": "layer-forwards",
               "amount": args.layer_forwards or scale.layer_forwards, "seeds": args.seeds, "jobs": args.jobs,
               "out": args.out, "depths": ",".join(map(str, DEPTHS))}
    return compare_command(BASE, options, scale.flags | settings)


def arms_of(scale: Scale) -> list[str]:
    """The arms as `looped compare` reads them."""
    return [f"{name}={arm} optim.lr={scale.rates[name]}" for name, arm in ARMS.items()]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line an arm."""
    header = ["core", "bits a byte", *(f"in {depth} step{'s' * (depth > 1)}" for depth in DEPTHS), "training steps",
              "layer forwards", "seconds", "the paper, text8"]
    lines = [[name, *_cells([row for row in rows if row.get("arm") == name]), PAPER[name]] for name in ARMS]
    found = next(row for row in rows if row["kind"] == "difference")
    return "\n\n".join([
        "# Masked diffusion in three blocks and end to end", markdown_table(header, lines),
        f"Bits a byte of held-out text (lower is better): the bound with ever more unmasking steps, and that of so "
        f"many; mean ± standard deviation over {found['num_seeds']} seed{'s' * (found['num_seeds'] > 1)}.",
        f"Three blocks against end to end, paired by text and seed: {found['mean']:+.3f} nats a token, 95 % interval "
        f"over texts [{found['ci_low']:+.3f}, {found['ci_high']:+.3f}]."])


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(metric: str, depth: int | None = None) -> str:
        return mean_cell(spread([row["mean"] for row in rows
                                 if (row.get("metric"), row.get("depth")) == (metric, depth)]))

    costs = [row for row in rows if row["kind"] == "cost"]
    spent = [f"{spread([row[name] for row in costs]).mean:,.0f}" for name in ("step", "layer_forwards", "seconds")]
    return [mean("bits_per_byte_bound"), *(mean("bits_per_byte", depth) for depth in DEPTHS), *spent]


if __name__ == "__main__":
    sys.exit(main())
