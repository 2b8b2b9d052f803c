"""Table 5 of DiffusionBlocks (arXiv 2506.14202): a recurrent-depth model trained by truncated back-propagation, and
the same model trained by single-pass denoising for three times as many epochs, judged by what they write.

    python scripts/reproduce/huginn_table5.py --scale cpu     # under an hour on two cores, everything at hand
    python scripts/reproduce/huginn_table5.py --scale paper   # LM1B, 2/4/2 layers of width 512: a GPU, and days

`cpu` keeps the structure, 2/4/2 layers, mean depth 32 with gradients through 8, and the ratio of epochs, on the default
corpus; an autoregressive run of another seed stands in for the judges and the encoder. The paper's figures are printed
beside, as what to compare the direction with. The same command again goes on where it was interrupted. Any setting of
`looped train` can be added, as in --data.path "texts/*.jsonl".
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAPER = {"truncated": {"mauve": 0.49, "gpt2-xl": 46.73, "llama-2": 17.04},
         "denoise": {"mauve": 0.70, "gpt2-xl": 42.43, "llama-2": 16.08}}
EPOCHS = {"truncated": 5, "denoise": 15, "ar": 15}
JUDGE_SEED = 1000
"""The judge must not have the seed of a writer."""


@dataclass(frozen=True)
class Scale:
    """`flags`: settings of every run. `epoch`: its tokens. `judges` and `encoder`: None for the run that stands in."""

    config: str
    flags: dict[str, object]
    epoch: int
    judges: tuple[str, ...] | None
    encoder: str | None


SCALES = {
    "cpu": Scale("stdlib-denoise.yaml", {
        "model.num_prelude_layers": 2, "model.num_core_layers": 4, "model.num_coda_layers": 2, "recurrence.mean": 32,
        "recurrence.backprop": 8, "evaluation.num_samples": 256, "training.threads": 1}, 80 * 1024, None, None),
    # LM1B's 30.3 million sentences are 0.8 billion words; documents are packed, as everywhere in this toolkit.
    "paper": Scale("huginn-70m.yaml", {
        "data.dataset": "billion-word-benchmark/lm1b", "data.max_bytes": 10**10, "data.length": 128,
        "training.batch_size": 512, "evaluation.num_samples": 5000, "evaluation.sample_length": 96},
        1_000_000_000, ("gpt2-xl", "meta-llama/Llama-2-7b-hf"), "gpt2-large"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--out", type=Path, help="folder of the runs; runs/table5-<scale> if not given")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of the two rules")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--epoch", type=int, help="tokens an epoch, to try it out; that of the scale if not given")
    args, settings = parser.parse_known_args()
    scale, out = SCALES[args.scale], args.out or Path("runs") / f"table5-{args.scale}"
    epoch = args.epoch or scale.epoch
    runs = [(rule, seed) for seed in range(args.seeds) for rule in ("truncated", "denoise")]
    stand_in = [("ar", JUDGE_SEED)] if scale.judges is None else []
    out.mkdir(parents=True, exist_ok=True)
    code = train_all([train_command(scale, epoch, rule, seed, out, settings) for rule, seed in [*runs, *stand_in]],
                     args.jobs)
    if code:
        return code
    judge = str(out / f"ar-{JUDGE_SEED}")
    found = [measure(scale, rule, seed, out, scale.judges or (judge,), scale.encoder or judge) for rule, seed in runs]
    table = report(found, scale.judges or ("ar run",))
    (out / "table5.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return 0


def train_command(scale: Scale, epoch: int, rule: str, seed: int, out: Path, settings: list[str]) -> list[str]:
    """`looped train` of one run: its rule's number of epochs, counted in tokens; `settings` are those of the user."""
    budget = {"training.budget": EPOCHS[rule] * epoch, "training.budget_unit": "tokens", "training.eval_every": 0}
    flags = {"objective": rule, "seed": seed} | scale.flags | budget
    return [sys.executable, "-m", "looped.cli", "train", str(ROOT / "configs" / scale.config),
            "--run", str(out / f"{rule}-{seed}"), *(f"--{name}={value}" for name, value in flags.items()), *settings]


def train_all(commands: list[list[str]], jobs: int) -> int:
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


def measure(scale: Scale, rule: str, seed: int, out: Path, judges: tuple[str, ...], encoder: str) -> dict:
    """{rule, seed, by depth: judge -> perplexity, distinct-2, MAUVE} of what a run writes."""
    run, found = out / f"{rule}-{seed}", {"rule": rule, "seed": seed}
    for judge in judges:
        features = ["--mauve", encoder] if judge == judges[0] else []  # MAUVE does not depend on the judge
        done = subprocess.run([sys.executable, "-m", "looped.cli", "eval", str(run), "--depths", "1,4,32", "--judge",
                               judge, *features, "--json"], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        for row in map(json.loads, done.stdout.splitlines()):
            if row["metric"] in ("judged_nats", "distinct_2", "mauve", "nats_per_token"):
                name = judge if row["metric"] == "judged_nats" else row["metric"]
                found.setdefault(row["depth"], {})[name] = row["mean"]
    return found


def report(found: list[dict], judges: tuple[str, ...]) -> str:
    """Markdown, a line a rule, seed and depth."""
    import math

    from looped.evaluation.report import markdown_table

    header = ["rule", "epochs", "seed", "depth", "MAUVE", *(f"perplexity, {judge}" for judge in judges), "distinct-2",
              "held-out nats"]
    lines = []
    for run in found:
        for depth in sorted(key for key in run if isinstance(key, int)):
            at = run[depth]
            nats = [value for name, value in at.items() if name not in ("distinct_2", "mauve", "nats_per_token")]
            lines.append([run["rule"], str(EPOCHS[run["rule"]]), str(run["seed"]), str(depth), f"{at['mauve']:.3f}",
                          *(f"{math.exp(value):.2f}" for value in nats), f"{at['distinct_2']:.3f}",
                          f"{at['nats_per_token']:.3f}"])
    theirs = "; ".join(f"{rule} ({EPOCHS[rule]} epochs): " + ", ".join(f"{name} {value}" for name, value in row.items())
                       for rule, row in PAPER.items())
    return f"{markdown_table(header, lines)}\n\nThe paper, on LM1B at width 512: {theirs}."


if __name__ == "__main__":
    sys.exit(main())
