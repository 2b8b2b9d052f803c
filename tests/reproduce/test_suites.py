"""The runs of the shipped suites, and which suites are refused."""

from pathlib import Path

import pytest

from looped import suites
from looped.cli import main
from looped.reproduce.plan import plan_entries
from looped.reproduce.suite import find_suite, known_suites, load_suite

GIVEN = {("masked_table3", "paper"): {"data.path": "x"}, ("classifier_tables", "cpu"): {"images.path": "somewhere"}}
SIZES = [(name, scale) for name, path in sorted(known_suites().items()) for scale in load_suite(path).scales]


@pytest.fixture
def configs(order):
    """`configs(suite, scale)`: entry -> (arm -> its config, helper -> its config); no arm is refused."""
    def go(name, scale):
        entries = plan_entries(order(name, scale, settings=GIVEN.get((name, scale), {})))
        assert all(not entry.refused for entry in entries)
        return {entry.name: ({arm.name: arm.config for arm in entry.plan.arms}, entry.helpers) for entry in entries}

    return go


def test_there_is_a_suite_for_each_table():
    assert set(known_suites()) == {"masked_table3", "classifier_tables", "depth_tasks", "dit_table2", "huginn_table5",
                                   "blocks_table4", "when_depth_pays", "puzzles_per_hour"}
    assert find_suite("dit-table2") == find_suite("dit_table2") == Path(suites.__file__).parent / "dit_table2.yaml"


@pytest.mark.parametrize("path", known_suites().values(), ids=str)
def test_a_suite_says_what_it_is_before_it_says_how(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"looped reproduce {path.stem}" in text
    assert max(map(len, text.splitlines())) <= 120
    assert set(load_suite(path).scales) == {"cpu", *({"long", "wide"} if path.stem == "when_depth_pays" else {"paper"})}


@pytest.mark.parametrize(("name", "scale"), SIZES)
def test_every_arm_applies_to_every_entry_with_the_same_layers_and_the_budget_of_the_suite(configs, order, name, scale):
    suite = load_suite(known_suites()[name])
    for arms, _ in configs(name, scale).values():
        assert list(arms) == list(suite.scales[scale].arms or suite.arms)
        same = [c for arm, c in arms.items() if "model.num_core_layers" not in suite.arms[arm].text]
        assert len({(c.model.num_core_layers, c.model.width, c.model.patch_size) for c in same}) == 1
        assert {c.training.budget_unit for c in arms.values()} == {suite.budget}
        amounts = {round(c.training.budget / suite.arms[arm].budget) for arm, c in arms.items()}
        assert len(amounts) == 1


# Suite, scale, entry, arm or helper: values of the runs that the published entries of docs/experiments.md are of.
PINNED = [
    ("masked_table3", "cpu", "", "end-to-end", {"optim.lr": 1e-3, "training.budget": 200_000, "blocks.num": 1,
                                                "evaluation.levels": 16, "training.clock": "processor"}),
    ("masked_table3", "cpu", "", "three-blocks", {"optim.lr": 2e-3, "blocks.num": 3, "training.num_evals": 5}),
    ("masked_table3", "paper", "", "three-blocks", {
        "optim.lr": 3e-4, "training.budget": 10**6 * 512 * 3 * 12, "data.vocab_size": 257, "model.width": 768}),
    ("classifier_tables", "cpu", "digits", "noprop-dt", {"optim.lr": 1e-2, "blocks.num": 3, "images.path": None}),
    ("classifier_tables", "cpu", "fashion", "blockwise-uniform", {
        "optim.lr": 2e-3, "blocks.partition": "log-uniform", "denoise.noise.sigma_max": 40.0, "model.patch_size": 7,
        "images.path": "somewhere", "training.budget": 1_000_000, "model.num_core_layers": 6}),
    ("classifier_tables", "paper", "cifar100", "end-to-end", {"objective": "ar", "training.budget": 360_000_000,
                                                              "images.randaugment": True, "model.ffn_width": 1024}),
    ("depth_tasks", "cpu", "sudoku6", "one-step", {"optim.lr": 1e-3, "training.budget": 80, "model.width": 128,
                                                   "training.batch_size": 64, "evaluation.num_problems": 128}),
    ("depth_tasks", "cpu", "p-hop", "truncated", {
        "optim.lr": 4e-3, "training.budget": 30, "recurrence.backprop": 4, "recurrence.per_sequence": False,
        "model.rope_base": 10_000, "task.options": {"every": True}, "task.difficulty": None}),
    ("depth_tasks", "paper", "sudoku9", "k-step", {"optim.lr": 2e-3, "training.budget": 3600, "model.width": 512,
                                                   "evaluation.num_problems": 1024, "denoise.train_steps": 2}),
    ("dit_table2", "cpu", "", "twin", {"objective": "denoise", "blocks.num": 1, "training.budget": 3000 * 64 * 18,
                                       "images.heldout": 0.3}),
    ("dit_table2", "cpu", "", "3-blocks-log-uniform", {"blocks.num": 3, "blocks.partition": "log-uniform"}),
    ("dit_table2", "cpu", "", "classifier", {"images.goal": "classify", "images.heldout": 0.3, "objective": "full",
                                             "training.budget": 600, "training.clock": "processor"}),
    ("dit_table2", "paper", "", "classifier", {"images.dataset": "uoft-cs/cifar10", "images.randaugment": True,
                                               "images.normalise": "symmetric", "training.precision": "bf16",
                                               "training.budget": 20_000, "optim.lr": 5e-4}),
    ("huginn_table5", "cpu", "", "truncated", {"training.budget": 5 * 80 * 1024, "recurrence.mean": 32,
                                               "recurrence.backprop": 8, "model.num_core_layers": 4}),
    ("huginn_table5", "paper", "", "denoise", {"training.budget": 15 * 10**9, "model.width": 512, "data.length": 128}),
    ("huginn_table5", "cpu", "", "ar-1000", {"objective": "ar", "seed": 1000, "training.budget": 15 * 80 * 1024,
                                             "recurrence.mean": 32}),
    ("blocks_table4", "cpu", "", "four-blocks", {"training.budget": 400_000, "blocks.num": 4, "blocks.layers": None,
                                                 "model.num_core_layers": 8}),
    ("blocks_table4", "paper", "", "end-to-end", {"objective": "ar", "training.budget": 10**5 * 512 * 3 * 14,
                                                  "optim.lr": 3e-4, "data.vocab_size": 32_000}),
    ("when_depth_pays", "cpu", "one-layer", "ar-full2-flops", {
        "objective": "ar", "training.budget": 3_502_080, "optim.weight_decay": 0.1, "optim.schedule": "wsd"}),
]


@pytest.mark.parametrize(("name", "scale", "entry", "who", "values"), PINNED)
def test_runs_are_those_of_the_experiments(configs, name, scale, entry, who, values):
    arms, helpers = configs(name, scale)[entry]
    config = {**arms, **helpers}[who]
    assert {setting: config.value(setting) for setting in values} == values


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_twins_are_the_blocks_but_for_what_the_table_is_about(configs, scale):
    arms, _ = configs("masked_table3", scale)[""]
    twin = arms["end-to-end"]
    assert twin == arms["three-blocks"].replace(**{"blocks.num": 1, "optim.lr": twin.optim.lr})
    arms, _ = configs("blocks_table4", scale)[""]
    assert arms["end-to-end"] == arms["four-blocks"].replace(objective="ar")
    arms, _ = configs("dit_table2", scale)[""]
    assert {sum(c.block_layers) for c in arms.values()} == {arms["twin"].model.num_core_layers}


def test_depths_are_those_of_the_arm_else_of_the_entry_else_of_the_config(order):
    (entry,) = plan_entries(order("blocks_table4"))
    assert entry.depths == {"end-to-end": (4,), "four-blocks": (4, 8, 16)}
    assert entry.plan.depths == [4, 8, 16]
    (entry,) = plan_entries(order("depth_tasks", entries="maze", arms="ar"))
    assert entry.depths == {"ar": (1, 10, 40, 80)}
    (entry,) = plan_entries(order("dit_table2", "paper", arms="twin"))
    assert entry.depths == {"twin": (9, 18, 32)}
    (entry,) = plan_entries(order("depth_tasks", entries="maze", arms="ar", depths=[2]))
    assert entry.depths == {"ar": [2]}


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "why"), [
    (["dit_table3"], "there is no suite 'dit_table3'; did you mean 'dit_table2'?"),
    (["nowhere/tiny.yaml"], "cannot read suite nowhere/tiny.yaml"),
    (["dit_table2", "--scale", "papr"], "--scale papr is unknown; did you mean 'paper'"),
    (["dit_table2", "--scale", "cpu,paper"], "--scale cpu,paper is unknown"),
    (["dit_table2", "--arms", "twins"], "did you mean 'twin'"),
    (["dit_table2", "--arms", "twin,4-blocks"], "does not split into blocks.num 4"),
    (["dit_table2", "--model.widht", "3"], "did you mean 'width'"),
    (["dit_table2", "--second", "3"], "looped reproduce --help"),
    (["dit_table2", "--seeds", "0"], "--seeds 0 is not at least 1"),
    (["dit_table2", "--training.budget", "7"], "--training.budget 7 would have no effect, since --amount sets it"),
    (["dit_table2", "--seed", "7"], "--seed 7 would have no effect, since every run has its own"),
    (["depth_tasks", "--entries", "mase"], "did you mean 'maze'"),
    (["depth_tasks", "--optim.lr", "1e-3"], "--optim.lr 1e-3 would have no effect, since arm 'full' sets it itself; "
                                            "leave it out, or run the arms with looped compare"),
    (["masked_table3", "--optim.lr=1e-3"], "--optim.lr 1e-3 would have no effect, since arm 'end-to-end' sets it "
                                           "itself"),
    (["masked_table3", "--scale", "paper"], "masked_table3 needs the files of text8 at scale paper; give --data.path"),
    (["classifier_tables"], "fashion needs the folder of its IDX files at scale cpu; give --images.path, or leave "
                            "fashion out of --entries"),
    (["--model.width", "3"], "reproduce without a name takes no settings")])
def test_what_cannot_be_is_one_sentence_and_nothing_is_trained(words, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("looped.reproduce.run.run_entry", lambda *_: pytest.fail("trained"))
    assert main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "why"), [
    ({"titel": "x"}, "unknown setting 'titel'; did you mean 'title'"),
    ({"arms": {"loop": {"text": "full", "txt": "ar"}}}, "unknown setting 'arms.loop.txt'; did you mean 'text'"),
    ({"columns": [{"label": "x", "where": {}, "feild": "mean"}]}, "unknown setting 'columns.0.feild'"),
    ({"columns": [{"label": "x", "where": {}, "show": "median"}]}, "columns.0.show: input should be 'mean'"),
    ({"columns": [{"label": "{depth", "where": {}}]}, "columns.0: expected '}' before end of string"),
    ({"columns": [{"label": "{depth} {by}", "where": {}}]}, "columns.0: label {depth} {by} needs exactly one name"),
    ({"arms": {}}, "arms: dictionary should have at least 1 item"),
    ({"arms": {"loop": {"text": ""}}}, "arms.loop.text: string should match pattern"),
    ({"budget": "hours"}, "budget: input should be 'tokens'"),
    ({"own": {"twice": {}}}, "suite names 'twice', which is unknown; known names: loop, once"),
    ({"entries": {"digits": {"own": {"loup": {}}}}}, "digits names 'loup', which is unknown; did you mean 'loop'"),
    ({"scales": {"cpu": {"time": "x", "amount": 1, "arms": ["loup"]}}}, "cpu names 'loup'"),
    ({"scales": {"cpu": {"time": "x", "amount": 1, "entries": ["loup"]}}}, "cpu names 'loup'"),
    ({"scales": {"cpu": {"time": "x"}}}, "scale cpu has no amount; set it there"),
    ({"scales": {"cpu": {"time": "x", "amount": 0}}}, "scales.cpu.amount: input should be greater"),
    ({"scales": {"cpu": {"time": "x", "amount": 1, "beforehand": {"judge": {"shares": ["modle"]}}}}},
     "modle is neither a setting nor a section of settings"),
    ({"config": "digits.yaml"}, "cannot read config"),
    ({"settings": {"model.widht": 3}}, "unknown setting 'model.widht'; did you mean 'width'"),
    ({"arms": {"loop": {"text": "fall"}}}, "objective 'fall' in 'loop=fall' is unknown"),
    ({"arms": {"loop": {"text": "full model.width"}}}, "'model.width=' is not a setting of an arm")])
def test_a_bad_suite_is_one_sentence(small, write, change, why, capsys):
    path = write(small(**change))
    assert main(["reproduce", str(path)]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_without_a_name_the_suites_are_listed(capsys):
    assert main(["reproduce"]) == 0
    shown = capsys.readouterr().out
    for name, path in known_suites().items():
        suite = load_suite(path)
        assert name in shown
        assert suite.reproduces in shown
        assert f"--scale cpu: {suite.scales['cpu'].time}" in shown


def test_a_value_in_brackets_reaches_the_comparison_whole(order):
    entry, = plan_entries(order("when_depth_pays", entries="one-layer", arms="ar,ramp,shallow"))
    _, ramp, shallow = entry.plan.arms
    assert [(stage.until, stage.mean) for stage in ramp.config.recurrence.stages] == [(0.25, 1), (0.5, 2), (0.75, 3)]
    assert shallow.config.recurrence.depths == {1: 5, 4: 1}


def test_every_arm_of_the_plane_can_train_on_every_entry(order):
    suite = load_suite(find_suite("when_depth_pays"))
    entries = plan_entries(order("when_depth_pays", entries=",".join(suite.entries), arms=",".join(suite.arms)))
    assert [(entry.name, entry.refused) for entry in entries] == [(name, {}) for name in suite.entries]
    decay = {(entry.name, arm.name): arm.config.optim.weight_decay for entry in entries for arm in entry.plan.arms}
    assert (decay["epochs-16", "ar"], decay["epochs-16", "full2"], decay["one-layer", "full2"]) == (0.5, 2.0, 0.1)
