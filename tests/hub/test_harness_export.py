"""Unmodified lm-evaluation-harness on an exported run gives the figures of `looped eval --tasks`, at any depth."""

import json

import pytest
from harness_tasks import write_tasks
from tiny_models import TEXT

from looped.cli import main
from looped.config import load_config
from looped.hub.exporting import export
from looped.training.runs import load_run
from looped.training.train import train

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from looped.hub.harness import RunLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("unchecked")

DEPTHS = (1, 6)
TINY = {"objective": "truncated", "model.width": 32, "model.num_heads": 2, "model.num_core_layers": 1,
        "data.length": 96, "data.vocab_size": 300, "training.batch_size": 4, "training.budget": 12,
        "training.num_evals": 0, "optim.lr": 0.02, "optim.warmup_steps": 0, "evaluation.batch_size": 4}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Of a loop that starts from noise: (task, metric, depth) -> (figure by `looped eval --tasks`, by lm_eval on the
    export); and for each request of each task at the greater depth what was answered, here and there."""
    import datasets

    root = tmp_path_factory.mktemp("harness")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    config = load_config(None, TINY | {"data.path": str(root / "text.txt"), "data.cache_dir": str(root)})
    train(config, root / "run")
    export(load_run(root / "run"), root / "out")
    tasks, here = write_tasks(root), TaskManager(include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        depths = ",".join(map(str, DEPTHS))
        assert main(["eval", str(root / "run"), "--tasks", ",".join(tasks), "--depths", depths]) == 0
        found, answers = {}, []
        for depth in DEPTHS:
            theirs = lm_eval.simple_evaluate(
                model="hf", model_args=f"pretrained={root / 'out'},num_steps={depth},trust_remote_code=True,"
                                       f"dtype=float32", tasks=tasks, device="cpu", batch_size=3, bootstrap_iters=0,
                task_manager=here)
            for task, values in theirs["results"].items():
                found |= {(task, name.split(",")[0], depth): value for name, value in values.items()
                          if isinstance(value, float) and "stderr" not in name}
        ours = lm_eval.simple_evaluate(model=RunLM(load_run(root / "run"), max(DEPTHS)), tasks=tasks,
                                       bootstrap_iters=0, task_manager=here)
    for task, samples in theirs["samples"].items():
        answers += [(task, mine["resps"], other["resps"])
                    for mine, other in zip(ours["samples"][task], samples, strict=True)]
    lines = [json.loads(line) for line in (root / "run/eval/tasks.jsonl").read_text().splitlines()]
    keys = [(line["task"], line["metric"], line["depth"]) for line in lines]
    return {key: (line["mean"], found[key]) for key, line in zip(keys, lines, strict=True)}, answers


def test_the_figures_are_the_same(measured):
    """Three types of tasks at two depths; sums are made in other batches there, padded, so to rounding."""
    figures, _ = measured
    assert {task for task, _, _ in figures} == {"pick", "write", "read"}
    assert {depth for _, _, depth in figures} == set(DEPTHS)
    for key, (ours, theirs) in figures.items():
        assert ours == pytest.approx(theirs, rel=1e-4), key


def test_every_answer_is_the_same(measured):
    """The log-probability of each choice and each document, and the text of each answer that is written."""
    _, answers = measured
    assert len(answers) == 21
    for task, ours, theirs in answers:
        if task == "write":
            assert ours == theirs
            assert len(ours[0][0]) > 2
        else:
            flat = [[float(value) for part in each for value in (part[0] if isinstance(part[0], tuple) else part)]
                    for each in (ours, theirs)]
            assert flat[0] == pytest.approx(flat[1], rel=1e-4, abs=1e-4)


def test_depth_reaches_the_model(measured):
    """Positive control: the other depth has other perplexities."""
    figures, _ = measured
    for metric in ("word_perplexity", "bits_per_byte"):
        assert abs(figures["read", metric, 1][0] / figures["read", metric, 6][0] - 1) > 1e-3


def test_a_denoisers_likelihood_there_is_its_bound_of_one_step_here(tmp_path):
    """At any depth. It starts from pure noise there, and from the truth with noise here, so in the mean."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = load_config(None, TINY | {"objective": "denoise", "data.path": str(tmp_path / "text.txt"),
                                       "data.cache_dir": str(tmp_path)})
    train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    folder = str(export(run, tmp_path / "out"))
    asked = [Instance("loglikelihood", {}, (f"def f{i}", f"(x):\n    return x * {i}\n"), 0) for i in range(20, 32)]
    ours = [score for score, _ in RunLM(run, 1).loglikelihood(asked)]
    theirs = {}
    for depth in DEPTHS:
        model = HFLM(pretrained=folder, device="cpu", num_steps=depth, trust_remote_code=True, batch_size=1)
        theirs[depth] = [score for score, _ in model.loglikelihood(asked, disable_tqdm=True)]
        assert sum(theirs[depth]) == pytest.approx(sum(ours), rel=0.05)
    assert theirs[1] == theirs[6]
