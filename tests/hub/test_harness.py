"""`looped eval --tasks`: lm-evaluation-harness over depth, held against its own model for transformers, and against
log-softmax worked out here."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from harness_tasks import PICK, PICKED, WRITE, WRITTEN, write_task, write_tasks
from tiny_models import TEXT, byte_level
from tokenizers import processors

from looped.cli import main
from looped.errors import UserError
from looped.evaluation.likelihood import next_token_losses
from looped.hub.importing import import_model
from looped.training.runs import load_run

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from looped.hub.harness import RunLM, models_of  # noqa: E402
from looped.hub.harness_tasks import Benchmarks, _loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("unchecked")

LENGTH = 96
TINY = {"model.width": 32, "model.num_heads": 2, "model.num_prelude_layers": 1, "model.num_core_layers": 1,
        "model.num_coda_layers": 1, "data.length": 64, "training.batch_size": 2, "training.budget": 2,
        "training.num_evals": 0, "evaluation.batch_size": 4, "optim.warmup_steps": 0}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def save_llama(folder, backend, start):
    """A small Llama and a tokenizer whose texts begin with `start`, in a folder."""
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=352, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0, max_position_embeddings=LENGTH))
    made.save_pretrained(folder)
    names = {"bos_token": start, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"), byte_level(), "<|endoftext|>")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llama(folder, tmp_path_factory):
    """The Llama as a run."""
    path = tmp_path_factory.mktemp("runs") / "llama"
    import_model(folder, path)
    return path


@pytest.fixture(scope="module")
def make(folder, tmp_path_factory):
    """A function that trains a tiny run for two steps, once for the same settings."""
    root, made = tmp_path_factory.mktemp("trained"), {}
    (root / "text.txt").write_text(TEXT, encoding="utf-8")

    def train(**settings):
        name = "-".join(map(str, settings.values())).replace(".", "") or "plain"
        if name not in made:
            given = {"objective": "truncated", "model.state_init": "zero", "data.path": root / "text.txt",
                     "data.tokenizer": folder, **TINY, **{key.replace("__", "."): v for key, v in settings.items()}}
            (root / f"{name}.yaml").write_text("seed: 0\n")
            flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
            assert main(["train", str(root / f"{name}.yaml"), "--run", str(root / name), *flags]) == 0
            made[name] = root / name
        return made[name]

    return train


@pytest.fixture(scope="module")
def looped(make):
    return make()


@pytest.fixture(scope="module")
def noisy(make):
    """A run whose loop starts from noise."""
    return make(model__state_init="like-init")


def answers_of(model, tasks):
    """(figures, what was answered to each request) by task, as lm_eval gives them; `model`: an LM."""
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    found = lm_eval.evaluator.evaluate(model, loaded, bootstrap_iters=0)
    return found["results"], {name: [sample["resps"] for sample in samples]
                              for name, samples in found["samples"].items()}


@pytest.fixture(scope="module")
def theirs(folder, tasks):
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", tasks=list(tasks), device="cpu", batch_size=2,
        bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
    return found["results"], {name: [sample["resps"] for sample in samples]
                              for name, samples in found["samples"].items()}


def instances(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def scores(model, *pairs):
    return model.loglikelihood(instances("loglikelihood", *pairs))


# ---- against lm_eval's own model ------------------------------------------------------------------------------------


def test_a_llama_answers_as_under_lm_evals_model_for_transformers(llama, tasks, theirs):
    """Scores of choices, texts, and perplexities of documents longer than the model's context."""
    figures, answered = answers_of(RunLM(load_run(llama), 1), tasks)
    for name, replies in theirs[1].items():
        for ours, expected in zip(answered[name], replies, strict=True):
            if name == "write":
                assert ours == expected
            else:
                assert torch.allclose(torch.tensor(ours, dtype=torch.double),
                                      torch.tensor(expected, dtype=torch.double), rtol=1e-4, atol=2e-3)
    assert any(text for (text,), in answered["write"])
    for name, metrics in theirs[0].items():
        for metric, value in metrics.items():
            assert figures[name][metric] == pytest.approx(value, rel=1e-3) if isinstance(value, float) else True


def test_a_tokenizer_that_begins_each_text_begins_it_here_too(tmp_path):
    """As Llama's, with a start that is not its end; the empty context is that start."""
    backend = byte_level()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[
        ("<s>", backend.token_to_id("<s>"))])
    import_model(save_llama(tmp_path / "model", backend, "<s>"), tmp_path / "run")
    ours, theirs = RunLM(load_run(tmp_path / "run"), 1), HFLM(str(tmp_path / "model"), dtype="float32", device="cpu")
    assert ours.tok_encode("def")[0] == ours.prefix_token_id == theirs.prefix_token_id == backend.token_to_id("<s>")
    for (one, likeliest), (other, greedy) in zip(scores(ours, *PAIRS), scores(theirs, *PAIRS), strict=True):
        assert one == pytest.approx(other, abs=2e-3)
        assert likeliest == greedy
    texts = [instances("loglikelihood_rolling", (TEXT[:400],)), instances("generate_until", (
        "def f1", {"until": ["\n"], "max_gen_toks": 12}), ("x", {"until": [" "], "max_gen_toks": 6}))]
    assert ours.loglikelihood_rolling(texts[0]) == pytest.approx(theirs.loglikelihood_rolling(texts[0]), rel=1e-5)
    assert ours.generate_until(texts[1]) == theirs.generate_until(texts[1])


def test_the_rows_of_the_command_are_lm_evals_figures(llama, tasks, theirs, tmp_path, capsys):
    assert main(["eval", str(llama), "--tasks", ",".join(tasks), "--depths", "1", "--json",
                 "--out", str(tmp_path / "out")]) == 0
    rows = {(row["task"], row["metric"]): row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    expected = {(name, key.removesuffix(",none")): value for name, metrics in theirs[0].items()
                for key, value in metrics.items() if key.endswith(",none") and "_stderr" not in key}
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        assert row["mean"] == pytest.approx(expected[key], rel=1e-3)
        assert row["ci_low"] <= row["mean"] <= row["ci_high"]
        assert (row["depth"], row["step"], row["n"]) == (1, 0, {"pick": 12, "write": 5, "read": 4}[key[0]])
    assert 0 < rows["pick", "acc"]["stderr"] < 0.2


# ---- scores ---------------------------------------------------------------------------------------------------------

PAIRS = [("def f1(x):", "\n    return x"), ("def f1(x):", " None"), ("", "def"), ("x " * 9, "* 3"), ("def ", "f1"),
         ("naïve ", "→ 🙂"), ("y", "\n    return x")]


def test_scores_are_the_log_softmax_at_each_depth(looped):
    """Worked out here from the logits of one text at a time; another depth gives others."""
    run = load_run(looped)
    found = {}
    for model in models_of(run, [1, 5]):
        expected = []
        for context, answer in PAIRS:
            whole = run.tokenizer.encode(context.rstrip() + context[len(context.rstrip()):] + answer)
            first = len(run.tokenizer.encode(context.rstrip()))
            tokens = torch.tensor([whole if context else [run.tokenizer.end_of_text, *whole]])
            first = first if context else 1
            with torch.no_grad():
                log_probs = run.objective.model(tokens[:, :-1], model.depth).log_softmax(-1)[0, first - 1:]
            sought = tokens[0, first:]
            expected.append((log_probs.gather(1, sought.unsqueeze(1)).sum().item(),
                             bool((log_probs.argmax(1) == sought).all())))
        found[model.depth] = scores(model, *PAIRS)
        for (ours, likeliest), (nats, greedy) in zip(found[model.depth], expected, strict=True):
            assert ours == pytest.approx(nats, abs=1e-4)
            assert likeliest == greedy
    assert any(abs(a - b) > 0.01 for (a, _), (b, _) in zip(found[1], found[5], strict=True))


def test_a_likeliest_token_is_told(looped):
    """The control of a flag that is false almost everywhere."""
    run = load_run(looped)
    model, tokens = RunLM(run, 2), run.tokenizer.encode("def f1(x):")
    best = run.objective.model(torch.tensor([tokens]), 2)[0, -1].argmax().item()
    found = [model._loglikelihood_tokens([(None, tokens, [token])])[0][1] for token in (best, (best + 1) % 300)]
    assert found == [True, False]


def test_all_depths_come_from_one_unroll(looped):
    run, calls = load_run(looped), []
    run.objective.model.recurrence.core.register_forward_hook(lambda *_: calls.append(1))
    for model in models_of(run, [1, 2, 6]):
        scores(model, PAIRS[0], PAIRS[0])
    assert len(calls) == 6


@pytest.mark.parametrize("which", ["looped", "noisy"])
def test_no_answer_depends_on_the_batch_or_its_order(which, request, tasks):
    """Also where the loop starts from noise, which is then that of the request; another seed gives other scores."""
    path = request.getfixturevalue(which)
    alone, together = (RunLM(load_run(path), 3, batch_size=size) for size in (1, 4))
    backwards = scores(together, *PAIRS[::-1])[::-1]
    for one, four in zip(scores(alone, *PAIRS), backwards, strict=True):
        assert one[0] == pytest.approx(four[0], abs=1e-4)
    (one, said), (four, same) = answers_of(alone, tasks), answers_of(together, tasks)
    assert said["write"] == same["write"]
    assert one["pick"]["acc,none"] == four["pick"]["acc,none"]
    assert one["read"]["bits_per_byte,none"] == pytest.approx(four["read"]["bits_per_byte,none"], rel=1e-5)
    other = scores(RunLM(load_run(path, settings={"seed": 5}), 3), *PAIRS)
    assert (max(abs(a - b) for (a, _), (b, _) in zip(backwards, other, strict=True)) > 1e-3) == (which == "noisy")


def test_a_denoiser_scores_by_its_bound(make):
    run = load_run(make(objective="denoise"))
    tokens = torch.tensor([run.tokenizer.encode("def f1(x):\n    return x")])
    one, four = ([score for model in models_of(run, [1, 4]) for score, _ in scores(model, *PAIRS[:size])]
                 for size in (1, 7))
    assert one == pytest.approx([four[0], four[7]], abs=1e-4)
    assert one[0] != pytest.approx(one[1], abs=1e-3)
    losses = next_token_losses(run.objective, tokens, 4).sum().item()  # other draws of the same bound, the whole text
    whole = run.tokenizer.encode("def f1(x):\n    return x")
    found = -RunLM(run, 4)._loglikelihood_tokens([(None, whole[:1], whole[1:])])[0][0]
    assert found == pytest.approx(losses, rel=0.2)


def test_what_is_too_long_loses_its_beginning(looped):
    run = load_run(looped)
    model = RunLM(run, 2, max_length=20)
    tokens = run.tokenizer.encode("def f7(x):\n    return x * 7 " * 4)
    (cut, _), (whole, _) = (each._loglikelihood_tokens([(None, tokens[:-3], tokens[-3:])])[0]
                            for each in (model, RunLM(run, 2, max_length=500)))
    (expected, _), = RunLM(run, 2)._loglikelihood_tokens([(None, tokens[-21:-3], tokens[-3:])])
    assert cut == pytest.approx(expected, abs=1e-5)
    assert cut != pytest.approx(whole, abs=1e-4)
    assert model.num_cut == 1
    with pytest.raises(UserError, match="an answer of 21 tokens, but this run scores 1 to 20"):
        model._loglikelihood_tokens([(None, tokens[:2], tokens[:21])])


# ---- texts ----------------------------------------------------------------------------------------------------------


def written(model, *requests):
    return model.generate_until(instances("generate_until", *requests))


def test_a_text_ends_before_the_first_of_its_stop_strings(llama):
    model = RunLM(load_run(llama), 1)
    (whole,) = written(model, ("def f1", {"until": [], "max_gen_toks": 16}))
    stops = [whole[5:7], whole[9:11]]
    (ended,) = written(model, ("def f1", {"until": stops, "max_gen_toks": 16}))
    assert ended == whole[: min(whole.index(stop) for stop in stops)]
    assert 0 < len(ended) < len(whole)
    assert written(model, ("def f1", {"until": stops[0], "max_gen_toks": 16})) == [whole[: whole.index(stops[0])]]


def test_a_long_prompt_leaves_room_for_its_answer(llama):
    """As if its beginning had not been there."""
    run = load_run(llama)
    ids = run.tokenizer.encode(TEXT)[:200]
    text, end = run.tokenizer.decode(ids), run.tokenizer.decode(ids[-(LENGTH - 8):])
    assert run.tokenizer.encode(text)[-(LENGTH - 8):] == run.tokenizer.encode(end)
    model = RunLM(run, 1)
    assert written(model, (text, {"max_gen_toks": 8})) == written(RunLM(run, 1, max_length=900),
                                                                  (end, {"max_gen_toks": 8}))
    assert model.num_cut == 1
    with pytest.raises(UserError, match=r"answers of up to 96 tokens, but this run reads 96.* above 96"):
        written(model, ("def", {"max_gen_toks": LENGTH}))


def test_a_question_that_is_asked_again_is_sampled_anew(noisy):
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    model = RunLM(load_run(noisy), 2, batch_size=2)
    first, other, again = written(model, ("def", sampled), ("def f", sampled), ("def", sampled))
    assert first != again
    assert written(model, ("def f", sampled), ("def", sampled)) == [other, first]


def test_an_unknown_setting_of_a_task_is_named(llama):
    with pytest.warns(UserWarning, match="a task asks for num_beams, which is not supported here"):
        written(RunLM(load_run(llama), 1), ("def", {"num_beams": 4, "max_gen_toks": 2}))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_report_holds_all_depths_that_were_measured(looped, tasks, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["eval", str(looped), "--tasks", ",".join(tasks), "--out", str(out)]
    assert main([*given, "--depths", "1,2"]) == 0
    assert main([*given, "--depths", "4"]) == 0
    assert re.search(r"\\| task +\\| +metric \\| +depth 1 \\| +depth 2 \\| +depth 4", capsys.readouterr().out)
    lines = [json.loads(line) for line in (out / "eval" / "tasks.jsonl").read_text().splitlines()]
    assert {line["depth"] for line in lines} == {1, 2, 4}
    report = (out / "report.md").read_text()
    for sentence in (r"pick \(acc", r"write \(exact_match\): never", r"read \(byte_perplexity, bits_per_byte\): "):
        assert re.search(rf"- {sentence}.*over (12|5|4) (questions|documents)", report), report
    assert re.search(r"\| pick +\| +acc \|.*\[", report)
    assert {path.name for path in (out / "plots" / "tasks").iterdir()} == {"pick.png", "write.png", "read.png"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "depth 4" in page


def test_other_examples_and_limits_are_kept_apart(looped, tasks, tmp_path):
    out = ["--out", str(tmp_path / "out"), "--depths", "1,3", "--json"]
    given = ["eval", str(looped), "--tasks", tasks[0], *out]
    for extra in ([], ["--limit", "8"], ["--limit", "8", "--num-fewshot", "2"]):
        assert main([*given, *extra]) == 0
    with pytest.warns(UserWarning, match="32 prompts have more than 9 tokens with their answers and were truncated"):
        assert main([*given, "--limit", "8", "--max-length", "9"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "eval" / "tasks.jsonl").read_text().splitlines()]
    kept = {(row.get("limit"), row["num_fewshot"], row.get("settings"), row["n"]) for row in rows}
    assert kept == {(None, 0, None, 12), (8, 0, None, 8), (8, 2, None, 8), (8, 0, "max_length=9", 8)}
    assert len(rows) == 4 * 2 * 2


def test_worked_examples_are_the_same_at_each_depth(looped, tasks):
    run = load_run(looped)
    _, second = Benchmarks(tasks[0], run, [1, 3], num_fewshot=2).measure()
    (alone,) = Benchmarks(tasks[0], run, [3], num_fewshot=2).measure()
    assert [row.as_dict() for row in second.rows] == [row.as_dict() for row in alone.rows]
    assert {row.num_fewshot for row in alone.rows} == {2}


def test_a_group_is_told_as_a_whole(looped, tmp_path):
    """Its figure pairs all questions of its tasks, which stand in a fold."""
    for name, part in (("one", PICKED[:5]), ("two", PICKED[5:])):
        write_task(tmp_path, name, part, PICK)
    group = tmp_path / "both.yaml"
    group.write_text("group: both\ntask: [one, two]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n")
    (part,) = Benchmarks(str(group), load_run(looped), [2]).measure()
    rows = {(row.task, row.metric): row for row in part.rows}
    whole = write_task(tmp_path, "whole", PICKED, PICK)
    (expected,) = Benchmarks(whole, load_run(looped), [2]).measure()
    assert rows["both", "acc"].mean == pytest.approx(expected.rows[0].mean)
    assert (rows["both", "acc"].n, rows["one", "acc"].group, rows["both", "acc"].group) == (12, "both", None)


# ---- bad input ------------------------------------------------------------------------------------------------------

BROKEN = {"not YAML": "task: [", "no task": "output_type: multiple_choice\n", "a list": "- 1\n",
          "a bad template": "task: bad\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
                            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q'\n"
                            "doc_to_choice: answers\ndoc_to_target: gold\n",
          "no data": "task: bad\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: /none.json}}}}\n"
                     "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"}


def refused(capsys, run, *arguments):
    """The one sentence of a command that fails and leaves nothing."""
    before = sorted(run.rglob("*"))
    assert main(["eval", str(run), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert sorted(run.rglob("*")) == before
    return said[0]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence(name, looped, tmp_path, capsys):
    good = write_task(tmp_path, "good", PICKED, PICK)
    path = tmp_path / "bad.yaml"
    path.write_text(BROKEN[name].format(data=good.replace(".yaml", ".json")))
    assert re.search(rf"task ({path}|bad) cannot be loaded \(\w+: ", refused(capsys, looped, "--tasks", str(path)))


@pytest.mark.parametrize(("flags", "why"), [
    (["--tasks", "none/at/all.yaml"], "--tasks none/at/all.yaml is not a file"),
    (["--tasks", " , "], "--tasks names no task"),
    (["--limit", "3"], "--limit 3 applies only to --tasks"),
    (["--tasks", "x", "--limit", "0"], "--limit 0 is below 1"),
    (["--tasks", "x", "--probes"], "--probes evaluates held-out text, which --tasks replaces")])
def test_flags_that_do_not_fit_are_one_sentence(flags, why, looped, capsys):
    assert why in refused(capsys, looped, *flags)


def test_an_unknown_task_is_told_with_the_nearest(tasks):
    with pytest.raises(UserError, match=r"lm_eval knows no task 'pikc'; did you mean 'pick'\?"):
        _loaded(["pikc"], ["pikc"], [Path(tasks[0]).parent], defaults=False)


@pytest.mark.slow
def test_an_unknown_task_is_one_sentence(looped, capsys):
    """lm_eval takes seconds to list those it has."""
    assert "no task 'helaswag'; did you mean 'hellaswag'?" in refused(capsys, looped, "--tasks", "helaswag")


def test_without_lm_eval_the_way_out_is_named(looped, tasks, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'looped[harness]'" in refused(capsys, looped, "--tasks", tasks[0])


def test_runs_that_cannot_be_asked_are_one_sentence(make, looped, tasks, tmp_path, capsys):
    masked = make(objective="masked")
    assert "objective masked has a bound on whole texts" in refused(capsys, masked, "--tasks", tasks[0])
    long = write_task(tmp_path, "long", WRITTEN, WRITE.replace("10", "64"))
    assert "answers of up to 64 tokens, but this run reads 64" in refused(capsys, looped, "--tasks", long)
    hidden = (looped / "tokenizer.json").rename(tmp_path / "hidden.json")
    try:
        assert "tokenizer.json cannot be read" in refused(capsys, looped, "--tasks", tasks[0])
    finally:
        hidden.rename(looped / "tokenizer.json")


def test_a_run_on_problems_is_not_asked(tmp_path, tasks, capsys):
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    flags = {**TINY, "objective": "full", "task.name": "copy", "recurrence.mean": 2, "evaluation.num_problems": 2,
             "evaluation.depths": "[1]"}
    flags.pop("data.length")
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert main(["train", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "run"), *words]) == 0
    capsys.readouterr()
    assert "--tasks is for text" in refused(capsys, tmp_path / "run", "--tasks", tasks[0])
