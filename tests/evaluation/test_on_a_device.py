"""Every evaluation on a device other than the processor: nothing meets a tensor that was left behind, and the figures
are the processor's."""

import math

import pytest
import torch
from pretend_device import pretend

from looped.config import load_config
from looped.data.image_batches import prepare_labelled
from looped.data.task_data import prepare_task
from looped.devices import CPU, Placement
from looped.evaluation.accuracy import classify
from looped.evaluation.depth_sweep import evaluate_depth, evaluate_samples
from looped.evaluation.image_features import classifier_features, pixel_features
from looped.evaluation.image_quality import evaluate_images
from looped.evaluation.judge import Judge, judged_rows
from looped.evaluation.likelihood import main_losses
from looped.evaluation.mauve import RunEncoder
from looped.evaluation.options import Options
from looped.evaluation.probes import probe
from looped.evaluation.sample_quality import Reference, matched_quality
from looped.evaluation.solving import evaluate_task
from looped.inference.exits import Exit
from looped.inference.generate import generate
from looped.models.build import build
from looped.objectives import build_objective

TINY = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2, "recurrence.mean": 2,
        "recurrence.backprop": 1, "denoise.cond_width": 8, "denoise.target.dim": 4, "data.length": 8,
        "evaluation.prompt_length": 4, "evaluation.num_problems": 2, "evaluation.batch_size": 2}
BLOCKS = {"objective": "blockwise", "blocks.num": 2}
RULES = {
    "truncated": {"objective": "truncated"}, "ar": {"objective": "ar"},
    "inject": {"objective": "denoise", "denoise.context": "inject"},
    "concat": {"objective": "denoise", "denoise.context": "concat", "denoise.block_size": 2},
    "context": {"objective": "denoise", "denoise.context": "context"},
    "adaptive": {"objective": "denoise", "denoise.noise.distribution": "adaptive"},
    "blocks": BLOCKS, "masked": {"objective": "masked"}, "masked blocks": {"objective": "masked", "blocks.num": 2}}


FAST = ("truncated", "inject", "masked", "full", "denoise", "noprop-dt", "forward-forward")
"""One rule of each path through the code; the others take the same path and a minute together."""


def some(names):
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def made(config, vocab_size, picture=None):
    return build_objective(config, build(config, vocab_size, picture)).eval()


def everywhere(work, objective):
    """The results of `work` for a model on the processor, and on the device."""
    with torch.no_grad():
        here = work(objective, torch.device("cpu"))
    with pretend() as device:
        there = work(objective.to(device), device)
    return here, there


def same(here, there):
    """Rows of figures that are the same, but for the clock and the memory."""
    assert len(here) == len(there) > 0
    for a, b in zip(here, there, strict=True):
        if a.metric == "tokens_per_second":
            continue
        assert (a.metric, a.depth, a.sigma, a.n) == (b.metric, b.depth, b.sigma, b.n)
        assert a.mean == pytest.approx(b.mean, rel=1e-4, abs=1e-5) or (math.isnan(a.mean) and math.isnan(b.mean))


@pytest.mark.parametrize("rule", some(RULES))
def test_text_is_measured_and_written(rule, unchecked):
    config, tokens = load_config(None, TINY | RULES[rule]), torch.arange(27).reshape(3, 9) * 7 % 20

    def work(objective, device):
        rows = tokens.to(device)
        sweep = evaluate_depth(objective, rows, [1, 2], bytes_per_token=2.0, batch_size=2, num_levels=2,
                               num_trajectories=2 if rule in ("inject", "context") else 0)
        written, texts = evaluate_samples(objective, rows[:2, :4], [2], num_tokens=4)
        ragged = generate(objective, rows[:3, :4], num_tokens=2, depth=2, lengths=torch.tensor([4, 2, 3]))
        if rule in ("ar", "inject"):
            judge = Judge("judge", objective, 1, "")
            written += judged_rows(judge, rows[:2, :4], texts[2], lambda ids: "a" * len(ids))
        if rule == "ar":
            written += matched_quality(objective, Reference("twin", objective, 1), judge, rows[:2, :4], texts,
                                       {"num_tokens": 4, "seed": 0}).rows
        if rule in ("truncated", "concat", "inject"):
            written += probe(objective, rows, sweep.per_example["nats_per_token"], vocab_size=20).rows
        if rule in ("truncated", "ar"):
            assert RunEncoder("run", objective, 2, lambda text: [1, 2, 3]).features(["a"]).device.type == "cpu"
        assert main_losses(objective, rows, 2, num_levels=2).device.type == "cpu"
        return sweep.rows + written, {depth: text.tolist() for depth, text in texts.items()}, ragged.tolist()

    here, there = everywhere(work, made(config, 20))
    same(here[0], there[0])
    assert here[1:] == there[1:]


SOLVERS = {"full": {}, "one-step": {}, "fixed-point": {},
           "denoise": {"denoise.context": "inject", "evaluation.trajectories": 2, "evaluation.choose": "consistent"},
           "blockwise": {"blocks.num": 2, "denoise.context": "inject"}}


@pytest.mark.parametrize("objective", some(SOLVERS))
def test_problems_are_solved(objective, unchecked):
    config = load_config(None, TINY | {"task.name": "prefix-sums", "task.difficulty": [4, 6], "objective": objective}
                         | SOLVERS[objective])
    data = prepare_task(config.task)

    def work(objective, device):
        options = Options(difficulties=[4], exits=[Exit.parse("kl"), Exit.parse("answer=2")])
        return evaluate_task(objective, data, config, [1, 3], options).rows

    same(*everywhere(work, made(config, data.vocab_size)))


CLASSIFIERS = {"full": {}, "denoise": {"denoise.context": "inject"}, "noprop-dt": {"blocks.num": 2}, "noprop-ct": {},
               "noprop-fm": {},
               "forward-forward": {"model.injection": "none", "model.num_prelude_layers": 0,
                                   "model.num_coda_layers": 0}}


@pytest.mark.parametrize("objective", some(CLASSIFIERS))
def test_images_are_named(objective, unchecked):
    pytest.importorskip("sklearn")
    config = load_config(None, TINY | {"images.source": "digits", "images.max_heldout": 5, "model.patch_size": 4,
                                       "objective": objective} | CLASSIFIERS[objective])
    data = prepare_labelled(config.images, config.model.patch_size)

    def work(model, device):
        return classify(model, data, config, [2]).rows

    same(*everywhere(work, made(config, data.vocab_size, data.picture)))


@pytest.mark.parametrize("rule", [{"objective": "denoise"}, pytest.param(BLOCKS, marks=pytest.mark.slow)],
                         ids=["one", "blocks"])
def test_images_are_made_and_seen_by_a_classifier(rule, unchecked):
    pytest.importorskip("sklearn")
    common = TINY | {"images.source": "digits", "images.max_heldout": 6, "model.patch_size": 4}
    config = load_config(None, common | rule | {
        "images.goal": "generate", "images.normalise": "symmetric", "model.num_prelude_layers": 0,
        "model.num_coda_layers": 0, "model.injection": "none", "denoise.context": "inject", "denoise.noise": "paper",
        "denoise.weight": "edm", "denoise.solver": "heun", "denoise.guidance": 2})
    data = prepare_labelled(config.images, config.model.patch_size)
    theirs = load_config(None, common | {"objective": "full"})
    seen = prepare_labelled(theirs.images, theirs.model.patch_size)
    classifier = made(theirs, seen.vocab_size, seen.picture)

    def work(objective, device):
        features = classifier_features("run", classifier.to(device), theirs, seen.images.scale, data.picture)
        plain = evaluate_images(objective, data, config, [2], pixel_features()).rows
        return plain + evaluate_images(objective, data, config, [2], features).rows

    same(*everywhere(work, made(config, data.vocab_size, data.picture)))


def test_the_pretended_device_refuses_what_a_real_one_would():
    with pretend() as device:
        there = torch.ones(3, device=device)
        assert (there + there).device == device
        assert (there + there).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="tensors on meta and cpu"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match=r"use .cpu\(\) first"):
            there.numpy()
        assert there.cpu().numpy().sum() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_text_has_the_figures_of_the_processor_on_a_gpu(rule):
    config, tokens = load_config(None, TINY | RULES[rule]), torch.arange(45).reshape(5, 9) * 7 % 20
    objective, found = made(config, 20), []
    for place in (CPU, Placement.of("cuda", "fp32"), Placement.of("cuda", "bf16")):
        with place.at_work():
            found.append(evaluate_depth(objective.to(place.device), tokens.to(place.device), [1, 3],
                                        bytes_per_token=2.0, num_levels=2).means("nats_per_token"))
    for depth, nats in found[0].items():
        assert found[1][depth] == pytest.approx(nats, rel=1e-3)
        assert found[2][depth] == pytest.approx(nats, rel=0.05)
