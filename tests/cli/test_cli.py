"""The command line: help that teaches, one sentence and exit code 2 for bad input, and the whole path on a tiny run."""

import gc
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from looped.cli import VERBS, main, split_settings, verb_class
from looped.cli.verb import parse_depths
from looped.config import describe_settings, dump_config
from looped.errors import UserError

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls


@pytest.fixture(scope="module")
def tiny_yaml(tmp_path_factory):
    """A config of a dozen steps on a text of its own."""
    folder = tmp_path_factory.mktemp("cli")
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # number {i}\n\n" for i in range(600))
    (folder / "text").mkdir()
    for part in range(6):
        (folder / "text" / f"{part}.txt").write_text(text[part * len(text) // 6 : (part + 1) * len(text) // 6])
    config = {
        "model": {"width": 16, "num_heads": 2, "num_core_layers": 1},
        "denoise": {"cond_width": 8, "target": {"dim": 4}}, "recurrence": {"mean": 2, "backprop": 1},
        "data": {"path": str(folder / "text"), "cache_dir": str(folder / "tokens"), "vocab_size": 300, "length": 16,
                 "heldout": 0.2},
        "training": {"budget": 6, "batch_size": 4, "threads": 1},
        "evaluation": {"num_sequences": 4, "sample_length": 4, "prompt_length": 4, "depths": [1, 2]},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def runs(tiny_yaml):
    """A trained and evaluated run of each kind."""
    paths = {}
    for objective in ("denoise", "truncated"):
        paths[objective] = tiny_yaml.parent / "runs" / objective
        assert main(["train", str(tiny_yaml), "--run", str(paths[objective]), "--objective", objective]) == 0
        assert main(["eval", str(paths[objective])]) == 0
    return paths


def test_help_loads_no_torch():
    code = "import sys; from looped.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "looped train smoke" in done.stdout


def test_a_command_lets_the_collector_look_rarely_and_leaves_it_as_it_was(monkeypatch):
    before, during = (700, 10, 10), []
    monkeypatch.setattr("looped.cli._dispatch", lambda _: during.append(gc.get_threshold()) or 0)
    restored = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        assert main([]) == 0
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*restored)
    assert during[0][0] > 100 * before[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert verb_class(verb).__doc__.split(".")[0].split(",")[0] in shown
    assert "usage: looped " + verb in shown


def test_the_help_of_train_fits_two_screens_and_names_every_setting(capsys):
    main(["train", "--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 80
    assert {name.rpartition(".")[2] for name, _, _ in describe_settings()} <= set(re.findall(r"\w+", shown))


def test_settings_are_told_from_other_flags():
    rest, settings = split_settings(["a.yaml", "--model.width", "64", "--run", "r", "--seed=3", "--optim.lr", "-1"])
    assert rest == ["a.yaml", "--run", "r"]
    assert settings == {"model.width": "64", "seed": "3", "optim.lr": "-1"}


def test_depths_are_parsed():
    assert parse_depths("4,1,2,2") == [1, 2, 4]
    for bad in ("", "1,x", "0,1", "1;2", "100001"):
        with pytest.raises(UserError, match="--depths"):
            parse_depths(bad)


@pytest.mark.parametrize(("arguments", "why"), [
    (["trian", "x.yaml"], "did you mean 'train'"),
    (["train"], "looped train --help"),
    (["train", "CONFIG", "--rnu", "x"], "--run"),
    (["train", "CONFIG", "--model.widht", "64"], "did you mean 'width'"),
    (["train", "CONFIG", "--model.width"], "has no value"),
    (["train", "CONFIG", "--model.width", "17"], "model: width 17"),
    (["train", "nowhere.yaml"], "cannot read config nowhere.yaml"),
    (["train", "CONFIG", "--run", "CONFIG"], "choose another --run"),
    (["eval", "nowhere"], "nowhere is not a run"),
    (["eval", "DENOISE", "--depths", "one"], "--depths 'one'"),
    (["eval", "DENOISE", "--model.width", "32"], "fixed when"),
    (["eval", "DENOISE", "--evaluation.num_sequence", "3"], "did you mean 'num_sequences'"),
    (["eval", "DENOISE", "--step", "5"], "no checkpoint of step 5; it has: 6"),
    (["eval", "DENOISE", "--trajectories", "-1"], "--trajectories -1"),
    (["eval", "DENOISE", "--judge", "./nowhere"], "./nowhere does not exist"),
    (["eval", "DENOISE", "--mauve", "."], "neither a run"),
    (["eval", "DENOISE", "--match", "DENOISE"], "add --judge"),
    (["generate", "DENOISE", "--depth", "0"], "--depth 0"),
    (["generate", "DENOISE", "--prompt", ""], "prompt"),
    (["generate", "DENOISE", "--temperature", "-1"], "temperature"),
    (["generate", "DENOISE", "--prompts", "nowhere.txt"], "cannot read --prompts nowhere.txt"),
    (["generate", "DENOISE", "--num-tokens", "many"], "num-tokens"),
    (["plot"], "plot"),
    (["plot", "nowhere"], "looped eval nowhere"),
    (["plot", "DENOISE", "--metric", "nat_per_token"], "did you mean 'nats_per_token'"),
    (["plot", "DENOISE", "--out", "depth.xyz"], "cannot write depth.xyz"),
    (["bench", "stop", "--config", "CONFIG"], "bench"),
    (["info", "nowhere.yaml"], "cannot read config"),
    (["info", "--seed", "3"], "takes no settings"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, why, tiny_yaml, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": str(tiny_yaml), "DENOISE": str(runs["denoise"])}
    capsys.readouterr()
    assert main([names.get(word, word) for word in arguments]) == 2
    said = capsys.readouterr()
    assert why in said.err
    assert said.err.startswith("looped: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_run_is_evaluated_into_its_folder(runs):
    for objective, path in runs.items():
        rows = [json.loads(line) for line in (path / "eval" / "depth.jsonl").read_text().splitlines()]
        assert {row["depth"] for row in rows if row["metric"] == "nats_per_token"} == {1, 2}
        assert {row["metric"] for row in rows} >= {"bits_per_byte", "distinct_2"}
        assert any(row["metric"] == "nats_at_sigma_max" for row in rows) == (objective == "denoise")
        examples = [json.loads(line) for line in (path / "eval" / "examples.jsonl").read_text().splitlines()]
        assert all(len(line["values"]) == 4 for line in examples)
        assert (path / "plots" / "depth.png").read_bytes().startswith(b"\x89PNG")
        assert (path / "plots" / "sigma.png").exists() == (objective == "denoise")


def test_a_judge_reads_the_samples_and_the_text_they_might_have_been(runs, capsys):
    assert main(["eval", str(runs["denoise"]), "--judge", str(runs["truncated"])]) == 0
    shown = capsys.readouterr().out
    assert "judged" in shown.splitlines()[2]
    rows = [json.loads(line) for line in (runs["denoise"] / "eval" / "depth.jsonl").read_text().splitlines()]
    assert {row["depth"] for row in rows if row["metric"] == "judged_nats"} == {1, 2}
    assert [row["n"] for row in rows if row["metric"] == "judged_nats_of_text"] == [2]


def test_samples_are_held_against_a_twins_at_equal_diversity_and_against_the_text(runs, tmp_path, capsys):
    """The run is its own twin: level with itself, at temperature 1."""
    run = str(runs["truncated"])
    assert main(["eval", run, "--judge", run, "--match", run, "--mauve", run, "--evaluation.num_samples", "8",
                 "--depths", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}: " in shown for name in ("judged", "matched", "mauve"))
    assert "+0.0 % [0.0, 0.0] at 1.00" in shown
    assert "too few to be reliable" in shown
    rows = [json.loads(line) for line in (tmp_path / "eval" / "depth.jsonl").read_text().splitlines()]
    assert {row["settings"] for row in rows} == {"evaluation.num_samples=8"}
    assert {row["by"] for row in rows if row["metric"] in ("mauve", "judged_nats", "matched_behind_twin")} == {run}
    assert {"repetition_4", "judged_bits_per_byte", "judged_bits_per_byte_of_text"} <= {row["metric"] for row in rows}
    assert main(["plot", str(tmp_path), "--metric", "mauve", "--out", str(tmp_path / "mauve.png")]) == 0


def test_probes_are_printed_and_kept(runs, capsys):
    assert main(["eval", str(runs["truncated"]), "--twin", str(runs["truncated"])]) == 0  # a twin asks for the probes
    assert "probes:" in capsys.readouterr().out
    lines = [json.loads(line) for line in (runs["truncated"] / "eval" / "probes.jsonl").read_text().splitlines()]
    assert {"behind_the_twin", "state_rms"} <= {line.get("metric") for line in lines}
    assert any("no better than chance" in line.get("verdict", "") for line in lines)  # six steps teach nothing
    assert main(["eval", str(runs["truncated"]), "--probes", "--json"]) == 0
    assert "scrambled_context_costs" in capsys.readouterr().out


def test_runs_are_compared_in_one_picture_and_one_table(runs, tmp_path, capsys):
    assert main(["plot", *map(str, runs.values()), "--out", str(tmp_path / "new" / "both.png")]) == 0
    table = capsys.readouterr().out
    assert table.count("| denoise") == table.count("| truncated") == 2
    assert (tmp_path / "new" / "both.md").read_text().strip() in table
    assert (tmp_path / "new" / "both.png").read_bytes().startswith(b"\x89PNG")


def test_solver_settings_act_on_a_trained_run(runs, capsys):
    texts = []
    for solver in ("euler", "ancestral"):
        main(["generate", str(runs["denoise"]), "--depth", "4", "--denoise.solver", solver, "--num-tokens", "40"])
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_a_solver_setting_of_a_run_that_has_no_solver_is_named(runs):
    with pytest.warns(UserWarning, match=r"denoise\.solver has no effect under objective truncated"):
        assert main(["generate", str(runs["truncated"]), "--denoise.solver", "euler", "--num-tokens", "3"]) == 0


def test_generation_reads_a_prompt_and_writes_json(runs, capsys):
    main(["generate", str(runs["truncated"]), "--prompt", "def f", "--num-tokens", "3", "--num-samples", "2", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["def f"] * 2
    assert lines[0]["text"] != lines[1]["text"]


def test_a_dry_run_trains_nothing_and_prints_a_config_that_loads(tiny_yaml, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(tiny_yaml), "--dry-run", "--model.width", "32"]) == 0
    shown = capsys.readouterr().out
    assert "width: 32" in shown
    assert "parameters" in shown
    assert not list(tmp_path.iterdir())


def test_a_dry_run_warns_of_a_state_that_grows_with_depth(tiny_yaml, capsys):
    flags = ["--objective", "full", "--model.injection", "add"]
    for block, warned in (("prenorm", True), ("sandwich", False)):
        assert main(["train", str(tiny_yaml), "--dry-run", *flags, "--model.block", block]) == 0
        assert ("warning: with model.injection add and model.block prenorm" in capsys.readouterr().out) == warned


def test_a_dry_run_counts_the_vocabulary_of_a_tokenizer_that_is_loaded(tiny_yaml, runs, capsys):
    shown = []
    for flags in ([], ["--data.tokenizer", str(runs["denoise"] / "tokenizer.json"), "--data.vocab_size", "5000"],
                  ["--data.vocab_size", "5000"]):
        main(["train", str(tiny_yaml), "--dry-run", *flags])
        shown.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters")))
    assert shown[0] == shown[1] != shown[2]


def test_the_config_of_a_run_goes_on_with_that_run(runs, capsys):
    before = sorted(path.name for path in (runs["denoise"] / "checkpoints").iterdir())
    assert main(["train", str(runs["denoise"] / "config.yaml")]) == 0
    assert "6 steps" in capsys.readouterr().out
    assert sorted(path.name for path in (runs["denoise"] / "checkpoints").iterdir()) == before


def test_a_config_that_could_not_start_may_be_corrected(tiny_yaml, tmp_path):
    bad = ["train", str(tiny_yaml), "--run", str(tmp_path / "run"), "--data.length", "100000"]
    assert main(bad) == 2
    assert main([*bad[:-1], "16", "--training.budget", "1"]) == 0


def test_info_describes_machine_config_and_run(tiny_yaml, runs, capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "\n  attention auto: sdpa\n" in said
    for name in ("xformers", "flash", "cudnn", "sdpa", "flex"):
        assert f"\n  attention {name}: " in said
    assert main(["info", str(tiny_yaml)]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["info", str(runs["denoise"])]) == 0
    assert "step 6 of 6 steps" in capsys.readouterr().out


def test_info_names_an_attention_backend_that_was_set(tiny_yaml, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", str(tiny_yaml), "--run", run, "--model.attention", "sdpa", "--training.budget", "1"]) == 0
    assert main(["info", run]) == 0
    assert "\nattention by sdpa (model.attention), which may be changed\n" in capsys.readouterr().out


def test_info_on_cuda_says_once_what_keeps_xformers_from_it(capsys, monkeypatch):
    absent = "xformers 1.2 is built for CUDA 12.8 and torch brings CUDA 99.0; pip install another"
    monkeypatch.setattr("looped.nn.backends._loaded", lambda: (None, absent))
    monkeypatch.setattr("looped.devices.devices_here", lambda: ["cuda:0", "cpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("looped.nn.backends.sdpa_declines", lambda *_: "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["info"]) == 0
    said = capsys.readouterr().out.partition("cuda:0 (a GPU), bf16\n")[2]
    assert said.startswith(f"  attention auto: sdpa\n  attention xformers: no, {absent}\n  attention flash: yes\n")
    assert said.count(absent) == 1


def test_a_reader_that_leaves_is_no_error(runs):
    command = f"{sys.executable} -m looped.cli info {runs['denoise']} | head -n 0"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_training_goes_on_when_the_reader_of_its_lines_leaves(tiny_yaml, tmp_path):
    command = (f"{sys.executable} -m looped.cli train {tiny_yaml} --run {tmp_path / 'run'} --training.log_every 1 "
               f"| head -n 1")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()
    assert "done: 6 steps" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_on_a_full_disk_is_one_sentence(tiny_yaml, tmp_path):
    command = f"{sys.executable} -m looped.cli train {tiny_yaml} --run {tmp_path / 'run'} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch("looped: cannot print to the standard output: No space left on device; .*\n", done.stderr)
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m looped.cli configs > /dev/full"], capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("looped: the standard output: no space left on the disk; ")


def test_dumped_configs_round_trip_through_the_command_line(tiny_yaml, tmp_path, capsys):
    main(["train", str(tiny_yaml), "--dry-run"])
    shown = capsys.readouterr().out.split("\n\n")[0]
    (tmp_path / "again.yaml").write_text(shown)
    from looped.config import load_config

    assert dump_config(load_config(tmp_path / "again.yaml")).strip() == shown.strip()


def test_prompts_of_a_file_are_continued_together(runs, tmp_path, capsys):
    """With a trained run and float32, on prompts of several lengths; each line is continued as it is alone."""
    (tmp_path / "prompts.txt").write_text("def f\n\nreturn x * 3  # num\nx\n")
    command = ["generate", str(runs["denoise"]), "--num-tokens", "6", "--depth", "2", "--json"]
    main([*command, "--prompts", str(tmp_path / "prompts.txt")])
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in together] == ["def f", "return x * 3  # num", "x"]
    for line in together:
        main([*command, "--prompt", line["prompt"]])
        assert line == json.loads(capsys.readouterr().out)


def test_two_samples_of_a_prompt_differ_and_are_those_of_the_prompt_alone(runs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("def f\nx\n")
    command = ["generate", str(runs["denoise"]), "--num-tokens", "9", "--num-samples", "2", "--json"]
    main([*command, "--prompts", str(tmp_path / "prompts.txt")])
    *_, one, two = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    main([*command, "--prompt", "x"])
    assert [one, two] == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert one["text"] != two["text"]


def test_text_is_written_at_the_depth_that_the_run_was_trained_for(runs, capsys):
    for objective, depth in (("truncated", 2), ("denoise", 2)):  # recurrence.mean of both
        assert main(["generate", str(runs[objective]), "--num-tokens", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["depth"] == depth


def test_a_prompt_and_a_file_of_prompts_are_refused_together(runs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("x\n")
    assert main(["generate", str(runs["denoise"]), "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "y"]) == 2
    assert "are both given; leave one out" in capsys.readouterr().err


# prepare

def test_prepare_says_what_it_made_and_then_that_all_is_there(tiny_yaml, tmp_path, capsys, monkeypatch):
    arguments = ["prepare", str(tiny_yaml), "--data.cache_dir", str(tmp_path / "tokens")]
    assert main(arguments) == 0
    made = capsys.readouterr().out
    (folder,) = (path for path in (tmp_path / "tokens").iterdir() if not path.name.startswith("."))
    size = sum(file.stat().st_size for file in (tiny_yaml.parent / "text").iterdir())
    tokens = sum((folder / name).stat().st_size for name in ("train.bin", "heldout.bin")) // 2
    assert re.fullmatch(rf"prepared: .*, 6 documents, {size:,} bytes of text, {tokens:,} tokens, vocabulary 300, in "
                        rf"{re.escape(str(folder))}; \d+\.\d\d s\n", made)
    assert main(arguments) == 0
    there = capsys.readouterr().out
    assert there.startswith("already prepared: ")
    assert there.split(":", 1)[1].rsplit(";", 1)[0] == made.split(":", 1)[1].rsplit(";", 1)[0]
    assert float(there.split()[-2]) < 1


def test_train_finds_what_prepare_made(tiny_yaml, tmp_path, monkeypatch):
    from looped.data import token_cache

    settings = ["--data.cache_dir", str(tmp_path / "tokens"), "--training.budget", "1"]
    assert main(["prepare", str(tiny_yaml), *settings]) == 0
    monkeypatch.setattr(token_cache, "_build", None)  # may not be called
    assert main(["train", str(tiny_yaml), "--run", str(tmp_path / "run"), *settings]) == 0


def test_prepare_has_nothing_to_do_for_a_task(capsys):
    assert main(["prepare", "sums-denoise"]) == 0
    assert capsys.readouterr().out.startswith("nothing to prepare: these data are made or read as they are needed")


def test_a_text_too_short_to_train_on_is_refused_by_prepare_too(tiny_yaml, tmp_path, capsys):
    assert main(["prepare", str(tiny_yaml), "--data.length", "1000000"]) == 2
    assert "lower data.length, give more text" in capsys.readouterr().err
