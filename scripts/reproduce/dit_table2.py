"""Tables 2 and 7 of DiffusionBlocks (arXiv 2506.14202): a Diffusion Transformer trained end to end, and in blocks with
noise levels of their own, at equal layer forwards; and by which rule the noise levels are parted.

    python scripts/reproduce/dit_table2.py --scale cpu      # under an hour on two cores, digits of 8 x 8 pixels
    python scripts/reproduce/dit_table2.py --scale paper    # DiT-S/2 on CIFAR-10 from the hub: a GPU, and days

What is trained first is a classifier of the same images, in whose features distances are measured. They are not
Inception's, so the figures are not the published FID: the paper's stand beside them as what to compare the direction
with. The same command again goes on where it was interrupted. Any setting of `looped train` can be added for all arms,
as in --model.width 96.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import chosen, parser_of, run_script

from looped.compare.cells import mean_cell
from looped.compare.plan import Place, Plan, make_plan, write_configs
from looped.compare.runner import train_all
from looped.compare.summary import spread
from looped.config import Config, load_config
from looped.config.arms import Arm
from looped.evaluation.image_distances import distances
from looped.evaluation.image_features import Features, classifier_features
from looped.evaluation.image_quality import evaluate_images
from looped.reports.markdown import markdown_table
from looped.training.checkpoint import write_text
from looped.training.monitor import costs_of, read_metrics
from looped.training.runs import load_run
from looped.training.trainer import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE, CLASSIFIER = CONFIGS / "digits-generate.yaml", CONFIGS / "digits-denoise.yaml"
"""What the settings below are changes to."""
TABLE, ROWS = "dit_table2.md", "dit_table2.jsonl"


@dataclass(frozen=True)
class ArmOf:
    """`text`: an arm as `looped compare` writes it. `paper`: the FIDs of the nearest thing in the paper."""

    text: str
    paper: str = "-"


ARMS = {
    "twin": ArmOf("denoise blocks.num=1", "39.83 CIFAR-10; 12.09 ImageNet"),
    "2-blocks": ArmOf("blockwise blocks.num=2", "9.90 ImageNet"),
    "3-blocks": ArmOf("blockwise blocks.num=3", "37.20, 38.03 CIFAR-10; 11.11 ImageNet"),
    "3-blocks-log-uniform": ArmOf("blockwise blocks.num=3 blocks.partition=log-uniform", "43.53 CIFAR-10"),
    "4-blocks": ArmOf("blockwise blocks.num=4", "11.90 ImageNet"),
    "6-blocks": ArmOf("blockwise blocks.num=6", "14.43 ImageNet"),
}


@dataclass(frozen=True)
class Scale:
    """`arms`: those that split its layers evenly. `layer_forwards`: the budget of each run. `common`: settings of all
    runs; `flags`: of the arms besides, `classifier`: of the classifier."""

    arms: tuple[str, ...]
    layer_forwards: int
    common: Mapping[str, Any]
    flags: Mapping[str, Any]
    classifier: Mapping[str, Any]


SCALES = {
    # 3,000 steps of the twin. A third of the images are held out, since distances between few of them are biased.
    "cpu": Scale(("twin", "2-blocks", "3-blocks", "3-blocks-log-uniform", "6-blocks"), 3000 * 64 * 18,
                 {"images.heldout": 0.3, "training.threads": 1, "training.clock": "processor"},
                 {"training.sample_every": 0, "training.num_evals": 8, "evaluation.depths": [4, 8, 16]},
                 {"objective": "full"}),
    "paper": Scale(tuple(ARMS), 100_000 * 512 * 36,
                   {"images.source": "dataset", "images.dataset": "uoft-cs/cifar10", "images.image_field": "img",
                    "images.flip": True, "training.threads": None, "training.precision": "bf16"},
                   {"images.normalise": "symmetric", "model.width": 384, "model.num_heads": 6, "model.ffn_width": 1024,
                    "model.num_core_layers": 12, "denoise.cond_width": 384, "denoise.noise": "paper",
                    "model.rope_base": 100.0, "optim.lr": 1e-4, "optim.weight_decay": 0.0, "optim.warmup_steps": 1000,
                    "optim.ema_decay": 0.9999, "training.batch_size": 512, "training.num_evals": 20,
                    "training.sample_every": 10_000, "evaluation.depths": [9, 18, 32], "evaluation.batch_size": 1000},
                   {"objective": "full", "model.width": 384, "model.num_heads": 6, "model.ffn_width": 1024,
                    "model.patch_size": 4, "images.randaugment": True, "optim.lr": 5e-4, "training.batch_size": 512,
                    "training.budget": 20_000}),
}


def main() -> int:
    parser = parser_of("dit_table2", __doc__, SCALES)
    parser.add_argument("--arms", help="rows of the table, with commas; those of the scale if not given")
    parser.add_argument("--layer-forwards", type=int, help="of each run; those of the scale if not given")
    return run_script("dit_table2", parser, reproduce)


def reproduce(args: argparse.Namespace, settings: dict[str, str]) -> int:
    """The exit code. Raises UserError, before anything is trained where an argument is wrong."""
    out, scale = args.out, SCALES[args.scale]
    names = chosen(args.arms or ",".join(scale.arms), ARMS)
    plan = plan_of(names, scale, args, settings, out)
    classifier = classifier_config(plan.config, scale)
    write_configs(plan)
    stopped = train(classifier, out / "classifier").exit_code
    if stopped:
        return stopped
    trained = train_all(plan, jobs=args.jobs)
    if trained.signal:
        return 128 + trained.signal
    if trained.finished:
        print(measured(plan, names, trained.finished, out))
    for name, why in trained.failures.items():
        print(f"dit_table2: {name}: {why}", file=sys.stderr)
    return 2 if trained.failures else 0


def plan_of(names: Sequence[str], scale: Scale, args: argparse.Namespace, settings: Mapping[str, Any],
            out: Path) -> Plan:
    """The runs. Raises UserError for settings that an arm refuses."""
    config = load_config(BASE, {**scale.common, **scale.flags, **settings})
    return make_plan(config, ",".join(f"{name}={ARMS[name].text}" for name in names), unit="layer-forwards",
                     amount=args.layer_forwards or scale.layer_forwards, num_seeds=args.seeds,
                     depths=config.evaluation.depths, out=out)


def classifier_config(config: Config, scale: Scale) -> Config:
    """Of the classifier: its own model on the same images, with the same of them held out."""
    images = {f"images.{name}": value for name, value in config.images.model_dump(mode="json").items()
              if name not in ("goal", "label_dropout")}
    return load_config(CLASSIFIER, {**images, **scale.common, **scale.classifier})


# ---- the table -------------------------------------------------------------------------------------------------------

def measured(plan: Plan, names: Sequence[str], places: Sequence[Place], out: Path) -> str:
    """The table of what has been trained, which is also written, with every figure in JSON lines."""
    run = load_run(out / "classifier")
    picture = load_run(places[0].run).objective.model.picture
    features = classifier_features(str(run.path), run.objective, run.config, run.data.images.scale, picture)
    rows = [row for place in places for row in rows_of(place, plan.depths, features)]
    write_text(out / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    text = report(plan, names, rows, features.name, of_training_images(run, features))
    write_text(out / TABLE, text + "\n")
    return text


def rows_of(place: Place, depths: Sequence[int], features: Features) -> list[dict[str, Any]]:
    """The figures of a run, and what its training took."""
    run, about = load_run(place.run), {"arm": place.arm.name, "seed": place.seed}
    found = evaluate_images(run.objective, run.data, run.config, depths, features)
    return [about | costs_of(read_metrics(place.run)) | {"metric": "cost"},
            *(about | row.as_dict() for row in found.rows)]


def of_training_images(run: Any, features: Features) -> float:
    """The Fréchet distance of training images, as many of each class as are held out: what a perfect generator has.
    With the classes as chance has it they would be further off than images that are made to the held-out classes."""
    train_images, heldout = run.data.images.train.pictures, run.data.images.heldout.pictures
    rows = [np.flatnonzero(train_images.labels == label)[:count]
            for label, count in zip(*np.unique(heldout.labels, return_counts=True), strict=True)]
    real, others = (features.of(torch.from_numpy(pixels)) for pixels in
                    (heldout.pixels, train_images.pixels[np.concatenate(rows)]))
    return distances(real, others, by=features.name).frechet


def report(plan: Plan, names: Sequence[str], rows: Sequence[Mapping[str, Any]], features: str, trained: float) -> str:
    """Markdown: a line an arm."""
    header = ["arm", "layers a step", "steps", "seconds", "held-out loss",
              *(f"Fréchet, {depth} steps" for depth in plan.depths), "precision", "recall", "FID in the paper"]
    lines = [_line(arm, plan, rows) for arm in plan.arms]
    arms = "\n".join(f"- {name}: `{ARMS[name].text}`." for name in names)
    table = markdown_table(header, lines)
    return "\n\n".join(["# End to end and block by block", table, _meaning(plan, features, trained), arms])


def _line(arm: Arm, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def cell(metric: str, depth: int | None = None, field: str = "mean") -> str:
        found = [row[field] for row in rows if (row["arm"], row["metric"]) == (arm.name, metric)
                 and row.get("depth") == depth and (depth is not None or "by" not in row)]
        return mean_cell(spread(found) if found else None)

    config, deepest = arm.config, max(plan.depths)
    layers = config.step_layers if config.objective == "blockwise" else config.model.num_core_layers
    costs = [cell("cost", field=field).split(".")[0] for field in ("step", "seconds")]
    return [arm.name, f"{layers:g}", *costs, cell("heldout_loss"),
            *(cell("frechet_distance", depth) for depth in plan.depths), cell("precision", deepest),
            cell("recall", deepest), ARMS[arm.name].paper]


def _meaning(plan: Plan, features: str, trained: float) -> str:
    return (f"Mean ± standard deviation over {plan.num_seeds} seeds (lower is better, but for precision and recall). "
            f"All arms have the same layers and {plan.amount:,} layer forwards of training, of which a backward pass "
            f"counts two; a step of training and a reading of the solver run the layers of one block. Fréchet distance "
            f"in features of {features}: not Inception FID; as many training images of each class as are held out are "
            f"at {trained:.3f} from these. Precision and recall at {max(plan.depths)} solver steps. The held-out loss "
            f"is that of the levels trained, each read by the block that owns it.")


if __name__ == "__main__":
    sys.exit(main())
