"""What a run says of itself while it trains: figures on held-out data, and samples, by the weights of the moment."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.heldout import HeldoutText, MeasuredText
from looped.data.labelled import LabelledData
from looped.data.opening import Data
from looped.data.problems import TaskData
from looped.evaluation.accuracy import classify
from looped.evaluation.depth import evaluate_samples
from looped.evaluation.image_quality import heldout_errors, training_levels
from looped.evaluation.image_samples import grid_of_classes
from looped.evaluation.likelihood import main_losses
from looped.evaluation.solving import one_answer, solved
from looped.inference.rollout import answer
from looped.inference.texts import as_lists
from looped.objectives import Objective
from looped.rng import StepRandom

HELDOUT_STEP = -1
"""The held-out loss draws its noise as this step would, which is never trained."""


def heldout_figures(objective: Objective, data: Data, config: Config) -> dict[str, float]:
    """Of text, a task or images; of a block alone its own loss, since a solver would ask the others."""
    if config.blocks.alone is not None:
        return heldout_own(objective, data, config)
    if config.generates:
        return heldout_error(objective, data, config)
    if isinstance(data, LabelledData):
        return heldout_accuracy(objective, data, config)
    return (heldout_solved if isinstance(data, TaskData) else heldout_loss)(objective, data, config)


def heldout_samples(objective: Objective, data: Data, config: Config) -> str | np.ndarray:
    """What the weights of the moment write, answer, or see; or a picture of what they make."""
    if config.generates:
        return made_images(objective, data, config)
    if isinstance(data, LabelledData):
        return sampled_classes(objective, data, config)
    return (sampled_answer if isinstance(data, TaskData) else sampled_text)(objective, data, config)


def heldout_loss(objective: Objective, data: MeasuredText, config: Config) -> dict[str, float]:
    """Of fixed held-out sequences, with the same noise at every call: the training loss, and `next_token`, which can be
    compared between objectives (`main_losses`)."""
    tokens, c = heldout_tokens(data, config).to(next(objective.parameters()).device), config.evaluation
    losses = main_losses(objective, tokens, config.main_depth, seed=config.seed, batch_size=c.batch_size,
                         num_levels=c.levels)
    return heldout_own(objective, data, config) | {"next_token": losses.mean().item()}


def heldout_tokens(data: MeasuredText, config: Config) -> Int[Tensor, "rows length_and_one"]:
    """The sequences that a run is measured on while it trains."""
    num = min(config.evaluation.num_sequences, data.heldout.windows(config.data.length))
    return data.heldout.sequences(num, config.data.length)


def heldout_own(objective: Objective, data: Data | HeldoutText, config: Config) -> dict[str, float]:
    """The training loss on held-out text, problems of the hardest trained level, or images, with the same noise at
    every call; it needs no solver."""
    device, total, done = next(objective.parameters()).device, 0.0, 0
    batches = list(_heldout_batches(data, config))
    num = sum(map(len, batches))
    for batch in batches:
        random = StepRandom(config.seed, HELDOUT_STEP, start=done, count=len(batch), total=num, device=device)
        total += objective(batch.to(device), random).value.item() * len(batch)
        done += len(batch)
    return {"loss": total / num}


def _heldout_batches(data: Data | HeldoutText, config: Config) -> Iterable[Tensor | Batch]:
    c = config.evaluation
    if isinstance(data, LabelledData):
        return data.heldout(c.batch_size)
    if isinstance(data, MeasuredText):
        return heldout_tokens(data, config).split(c.batch_size)
    problems = data.heldout(c.num_problems, data.train.high)
    return (data.collate(problems[start : start + c.batch_size]) for start in range(0, len(problems), c.batch_size))


def sampled_text(objective: Objective, data: MeasuredText, config: Config) -> str:
    """Continuations of held-out prompts, a line each, depth by depth with their distinct-2."""
    c = config.evaluation
    num = min(c.num_samples, data.heldout.windows(config.data.length))
    prompts = data.heldout.sequences(num, config.data.length)[:, : c.prompt_length]
    prompts = prompts.to(next(objective.parameters()).device)
    rows, samples = evaluate_samples(objective, prompts, c.sample_depths, num_tokens=c.sample_length, seed=config.seed)
    diversity = {row.depth: row.mean for row in rows if row.metric == "distinct_2"}
    lines = []
    for depth, texts in samples.items():
        lines.append(f"depth {depth}, distinct-2 {diversity[depth]:.3f}")
        lines += [f"  {data.tokenizer.decode(text)!r}" for text in as_lists(texts)]
    return "\n".join(lines)


def heldout_solved(objective: Objective, data: TaskData, config: Config) -> dict[str, float]:
    """Shares of held-out problems that are solved at the hardest trained level, and at the best of
    `evaluation.depths`."""
    found, hardest = solved(objective, data, config, config.evaluation.depths, [data.train.high]), data.train.high
    depth, share = found.best(hardest)
    first = min(found.per_example[hardest])
    return {"solved": share, "best_depth": depth,
            f"solved_at_{first}": found.per_example[hardest][first].double().mean().item()}


def sampled_answer(objective: Objective, data: TaskData, config: Config) -> str:
    """A held-out problem of the hardest trained level, and its answer at the deepest of `evaluation.sample_depths`."""
    depth = max(config.evaluation.sample_depths)
    problem, cells = one_answer(objective, data, config, depth, data.train.high)
    return f"depth {depth}\n{data.task.show(problem.inputs)}\n\n{data.task.show(cells)}"


def heldout_accuracy(objective: Objective, data: LabelledData, config: Config) -> dict[str, float]:
    """The share of held-out images that are named rightly, at the best of `evaluation.depths`."""
    found = classify(objective, data, config, config.evaluation.depths)
    depth, share = found.best()
    first = min(found.right)
    return {"accuracy": share, "best_depth": depth, f"accuracy_at_{first}": found.right[first].double().mean().item()}


def sampled_classes(objective: Objective, data: LabelledData, config: Config) -> str:
    """The first `evaluation.num_samples` held-out images, and what they are taken for at the deepest of
    `evaluation.sample_depths`."""
    c, names, depth = config.evaluation, data.images.class_names, max(config.evaluation.sample_depths)
    batch = next(iter(data.heldout(c.num_samples))).to(next(objective.parameters()).device)
    answers = answer(objective, batch, [depth], c, seed=config.seed)[depth].answers[:, 0].tolist()
    return "\n".join([f"depth {depth}", *(f"{names[label]} taken for {names[named]}" for label, named in
                                          zip(batch.targets[:, 0].tolist(), answers, strict=True))])


def heldout_error(objective: Objective, data: LabelledData, config: Config) -> dict[str, float]:
    """The denoising loss of held-out images at training levels, each read by the block that owns it, with the same
    noise at every call."""
    return {"loss": heldout_errors(objective, data, config, training_levels(objective, data, config)).mean().item()}


def made_images(objective: Objective, data: LabelledData, config: Config) -> np.ndarray:
    """A row of `evaluation.num_samples` images for each class, at the deepest of `evaluation.sample_depths`."""
    c = config.evaluation
    return grid_of_classes(objective, data.images.scale, max(c.sample_depths), c.num_samples,
                           guidance=config.denoise.guidance, seed=config.seed, batch_size=c.batch_size)
