"""Every shipped config loads, says what it is and trains; comparable ones differ in one setting; the demo works."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from looped.cli import main
from looped.config import load_config
from looped.data.from_config import open_data
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
IDS = [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_a_config_says_what_it_is_before_it_says_how(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"configs/{path.name}" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.fixture(scope="session")
def hundred_classes(tmp_path_factory):
    """A folder in place of CIFAR-100: two images of 32 x 32 pixels of each of 100 classes."""
    folder, gen = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for number in range(200):
        (folder / f"{number % 100:02d}").mkdir(exist_ok=True)
        pixels = gen.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number % 100:02d}" / f"{number}.png")
    return {"images.source": "folder", "images.path": str(folder), "images.dataset": None}


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_a_config_takes_an_optimiser_step(path, hundred_classes):
    """On its own model and objective, with short sequences."""
    small = {"data.length": 16, "evaluation.prompt_length": 4, "recurrence.mean": 2,
             "recurrence.depths": {1: 1, 2: 1}}
    config = load_config(path, small | (hundred_classes if path.stem == "vit-release" else {}))
    picture = None
    if config.kind.name != "text":
        data = open_data(config)
        vocab_size, picture, rows = data.vocab_size, data.picture, data.train.batch(0, batch_size=2, seed=0)
    else:
        vocab_size = config.data.vocab_size
        rows = torch.randint(vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    objective = build_objective(config, build(config, vocab_size, picture))
    num_steps = 12 if config.rule.trains_one_block(config) else 1  # by then each block has been drawn
    for step in range(num_steps):
        objective(rows, StepRandom(config.seed, step, count=2)).value.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_vit_release_has_the_sizes_of_the_release(hundred_classes):
    config = load_config(FOLDER / "vit-release.yaml", hundred_classes)
    data, model = open_data(config), config.model
    assert (model.width, model.num_heads, model.ffn_inputs, model.hidden, model.patch_size) == (128, 4, 3072, 3072, 4)
    assert (config.block_layers, data.vocab_size, data.picture.num_rows) == ((4, 4, 4), 100, 64 + 1)
    assert config.training.batch_size == 128


def test_the_stdlib_configs_differ_in_the_objective_alone():
    names = {"full", "truncated", "denoise"}
    settings = {name: yaml.safe_load((FOLDER / f"stdlib-{name}.yaml").read_text()) for name in names}
    assert {values.pop("objective") for values in settings.values()} == names
    assert settings["full"] == settings["truncated"] == settings["denoise"]


def test_the_blocks_of_stdlib_blockwise_in_a_row_are_its_end_to_end_twin():
    twin = load_config(FOLDER / "stdlib-blockwise.yaml", {"objective": "ar"})
    assert (twin.main_depth, twin.block_layers) == (3, (2, 2, 2))


def test_the_twin_of_digits_generate_has_its_layers_and_three_times_its_layer_forwards():
    path = FOLDER / "digits-generate.yaml"
    ours, twin = load_config(path), load_config(path, {"objective": "denoise", "blocks.num": 1})
    assert (ours.block_layers, twin.block_layers) == ((2, 2, 2), (6,))
    picture = open_data(ours).picture
    costs = [build_objective(config, build(config, 10, picture)).layer_forwards() for config in (ours, twin)]
    assert costs == [6, 18]


def test_one_block_with_all_the_layers_is_the_end_to_end_twin_of_stdlib_masked():
    """The layers of three blocks in a row, beside the one block of the twin with the same weights."""
    small = {"model.width": 16, "model.num_heads": 2, "data.vocab_size": 300, "masked.cond_width": 8}
    blocks, twin = (build_objective(config, build(config, 300)) for config in (
        load_config(FOLDER / "stdlib-masked.yaml", small | {"blocks.num": num}) for num in (3, 1)))
    layers = [layer for block in blocks.model.recurrence.core.blocks for layer in block.layers]
    (whole,) = twin.model.recurrence.core.blocks
    assert len(whole.layers) == len(layers) == 6
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in blocks.parameters())
    assert not list(whole.injection.parameters())


def test_huginn_70m_is_the_published_size():
    model = load_config(FOLDER / "huginn-70m.yaml").model
    assert (model.num_prelude_layers, model.num_core_layers, model.num_coda_layers) == (2, 4, 2)
    assert (model.width, model.num_heads, model.block) == (512, 8, "sandwich")


def test_the_smoke_config_trains_resumes_and_is_evaluated(tmp_path, capsys):
    run = tmp_path / "smoke"
    train = ["train", str(FOLDER / "smoke.yaml"), "--run", str(run), "--training.budget", "20"]
    assert main(train) == 0
    assert main(train) == 0  # nothing left to do
    assert main(["eval", str(run)]) == 0
    assert "| smoke |     8 |" in capsys.readouterr().out


@pytest.fixture
def demo():
    """scripts/demo.py."""
    found = spec_from_file_location("demo", FOLDER.parent / "scripts" / "demo.py")
    found.loader.exec_module(module := module_from_spec(found))
    return module


def test_make_demo_runs_the_script_with_the_flags():
    make = ["make", "--no-print-directory", "-n", "-o", ".venv/installed"]  # as a make within make would say it
    done = subprocess.run([*make, "demo", "DEMO=runs/other", "FLAGS=--seed 1"], cwd=FOLDER.parent, text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == ".venv/bin/python scripts/demo.py --out runs/other --seed 1"


def test_the_demo_leaves_one_picture_one_table_and_two_sentences(demo, tmp_path, monkeypatch, capsys):
    """The demo as it is, in this process, on models of two steps of training and with less to read."""
    monkeypatch.setattr(demo, "say", lambda arm, command: main(command))
    monkeypatch.setattr(demo, "ThreadPoolExecutor", lambda number: ThreadPoolExecutor(1))
    flags = {"training.budget": 2, "training.budget_unit": "steps", "model.width": 16, "model.num_heads": 2,
             "data.max_bytes": 200_000, "data.vocab_size": 300, "data.length": 32, "evaluation.num_sequences": 2,
             "evaluation.num_samples": 1, "evaluation.sample_length": 2, "evaluation.prompt_length": 4,
             "evaluation.num_problems": 4}
    demo.main(["--out", str(tmp_path), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    found = (tmp_path / "depth.md").read_text()
    assert found.count("\n| 64 bits, share solved: ") == 2
    assert found.count("\n| text, nats/token: ") == 3
    assert "\nPrefix sums: " in found
    assert "\nText: " in found
    assert found in capsys.readouterr().out


def test_a_command_of_the_demo_prints_behind_the_models_name_and_ends_it_where_it_fails(demo, capsys):
    demo.say(demo.ONE, ["configs"])
    assert "text-one:   smoke" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="text-one ended with exit code 2; the same command continues"):
        demo.say(demo.ONE, ["configs", "absent"])
