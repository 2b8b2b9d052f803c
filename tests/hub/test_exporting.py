"""`looped export`: a run as a folder that transformers reads, with this package or without it, its tokenizer and a
card; and back again. A model that has no place in a form is one sentence, and nothing is left behind."""

import json
from contextlib import nullcontext

import looped_folders
import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import change, saved
from tiny_models import TEXT, byte_level
from tokenizers import processors

from looped.cli import main
from looped.config import load_config
from looped.config.model import ModelConfig, RopeScaling
from looped.errors import UserError
from looped.hub.exporting import FORMS, export
from looped.hub.families import FAMILIES, open_pretrained, read_pretrained
from looped.hub.families.dense import scaling
from looped.hub.families.export_config import rope_parameters
from looped.hub.logits_api import LoopReader
from looped.inference.generate import generate
from looped.models.build import build
from looped.objectives import build_objective
from looped.training.runs import load_run
from looped.training.train import train

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("unchecked")

TINY = {"model.width": 32, "model.num_heads": 4, "model.ffn_width": 48, "data.length": 32, "data.vocab_size": 300,
        "training.batch_size": 4, "training.budget": 3, "training.num_evals": 0, "recurrence.mean": 3,
        "evaluation.num_sequences": 4}
PLAIN = {"objective": "full", "model.injection": "none", "model.state_init": "embedding"}
RUNS = {"truncated": {"objective": "truncated"}, "denoise": {"objective": "denoise"},
        "llama": PLAIN | {"model.preset": "llama"}, "qwen2": PLAIN | {"model.preset": "qwen2"},
        "qwen3": PLAIN | {"model.preset": "qwen3", "model.num_kv_heads": 2},
        "olmo2": PLAIN | {"model.preset": "olmo2"}, "mistral": PLAIN | {"model.preset": "mistral"},
        "nanbeige": {"objective": "full", "model.preset": "nanbeige", "model.num_core_layers": 3},
        "huginn": {"objective": "truncated", "model.preset": "huginn"},
        "masked": {"objective": "masked"},
        "log-normal": {"objective": "denoise", "denoise.noise.distribution": "log-normal"},
        "adaptive": {"objective": "denoise", "denoise.noise.distribution": "adaptive"},
        "blockwise": {"objective": "blockwise", "blocks.num": 2},
        "blocks by edges": {"objective": "blockwise", "blocks.num": 2, "blocks.edges": [1.5], "blocks.overlap": 0.1},
        "blocks of log-normal": {"objective": "blockwise", "blocks.num": 2, "blocks.choose": "uniform",
                                 "denoise.noise.distribution": "log-normal"},
        "alone": {"objective": "blockwise", "blocks.num": 2, "blocks.alone": 0, "blocks.shared": "frozen"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trained for three steps, when first asked for."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    made = {}

    def run(name):
        if name not in made:
            config = load_config(None, TINY | {"data.path": str(root / "text.txt"), "data.cache_dir": str(root)}
                                 | RUNS[name])
            with torch.enable_grad():
                train(config, root / name)
            made[name] = load_run(root / name)
        return made[name]

    return run


def tokens(run, rows=2, length=10):
    return torch.randint(1, run.tokenizer.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["truncated", "denoise", "log-normal", "adaptive", "blockwise", "blocks by edges",
                                  "blocks of log-normal"])
def test_stock_transformers_writes_the_text_of_looped_generate(name, runs, tmp_path):
    run = runs(name)
    folder = export(run, tmp_path / "out", num_steps=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words("def f(x):", return_tensors="pt")
    assert ids.input_ids[0].tolist() == run.tokenizer.encode("def f(x):")
    ours = generate(run.objective, ids.input_ids, num_tokens=9, depth=5, temperature=0, past_the_end=True)
    theirs = model.generate(**ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(theirs[:, ids.input_ids.shape[1]:], ours)
    assert words.decode(ours[0]) == run.tokenizer.decode(ours[0].tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_a_loop_unrolled_is_a_dense_model_of_transformers(name, runs, tmp_path):
    """Each step of the core is layers of its own there; other depths are other models, the control."""
    run = runs(name)
    for depth in (1, 4):
        folder = export(run, tmp_path / str(depth), name, num_steps=depth)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        c = run.config.model
        assert theirs.config.num_hidden_layers == c.num_prelude_layers + depth * c.num_core_layers + c.num_coda_layers
        found = theirs(tokens(run), use_cache=False).logits
        model = build(run.config, run.objective.model.vocab_size)
        model.load_state_dict(run.objective.model.state_dict())
        model = model.double()
        torch.testing.assert_close(found, model(tokens(run), depth), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found, model(tokens(run), depth + 1), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nanbeige", "huginn", "llama"])
def test_what_is_exported_is_imported_again_bit_for_bit(name, runs, tmp_path):
    run, depth = runs(name), 1 if name == "llama" else 5
    export(run, tmp_path / "out", name, num_steps=depth)
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    back = load_run(tmp_path / "back")
    assert back.config.main_depth == depth
    assert back.tokenizer.json() == run.tokenizer.json()
    model = run.objective.model
    noise = torch.randn(2, 10, 32) if model.recurrence.needs_noise else None
    found, expected = (each.objective.model(tokens(run), steps, noise=noise)
                       for each, steps in ((back, back.config.main_depth), (run, depth)))
    assert torch.equal(found, expected)


MAKERS = {"llama": saved, "qwen3": lambda folder: saved(folder, "Qwen3"), "olmo2": lambda f: saved(f, "Olmo2"),
          "nanbeige": lambda f: (saved(f), change(f, model_type="nanbeige", num_loops=2)),
          "huginn": looped_folders.huginn, "ouro": looped_folders.ouro,
          "smollm3": lambda f: saved(f, "SmolLM3"), "mistral": lambda f: saved(f, "Mistral"),
          "qwen2": lambda f: saved(f, "Qwen2")}


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_from_elsewhere_goes_back_bit_for_bit(name, tmp_path):
    """Every tensor of its folder, as it was; angles, which follow from the config, are worked out anew."""
    MAKERS[name](tmp_path)
    model, config = read_pretrained(tmp_path)
    family = open_pretrained(tmp_path).family
    found = dict(family.written(config, model.vocab_size, config.main_depth).tensors(model.state_dict()))
    before = load_file(tmp_path / "model.safetensors")
    assert found.keys() == before.keys()
    for key in before.keys() - {"freqs_cis"}:
        assert torch.equal(found[key], before[key]), key


def test_huginns_angles_are_cosines_and_sines_of_each_position_and_pair():
    family = next(family for family in FAMILIES if type(family).__name__ == "Huginn")
    config = load_config(None, TINY | RUNS["huginn"])
    found = family.written(config, 60, 4).extras["freqs_cis"]
    assert found.shape == (1, 4096, 1, 4, 2)
    position, pair = 700, 3
    angle = torch.tensor(position * 50_000.0 ** (-2 * pair / 8), dtype=torch.float64)
    torch.testing.assert_close(found[0, position, 0, pair].double(), torch.stack([angle.cos(), angle.sin()]),
                               rtol=0, atol=1e-6)


REFUSED = {
    "a norm before the coda": ("truncated", "llama", "but a model of the family llama has"),
    "an injection": ("huginn", "llama", "but a model of the family llama has"),
    "no biases": ("llama", "qwen2", "model.attention_bias is none, but a model of the family qwen2 has qkv"),
    "layers around the loop": ("llama", "nanbeige", "but a model of the family nanbeige has"),
    "a denoiser": ("denoise", "llama", "a Denoise is not a plain loop, and llama computes nothing else"),
    "a block alone": ("alone", "hf", "only the whole model can be exported"),
    "no next token": ("masked", "hf", "predicts no next token"),
    "an unknown form": ("llama", "lama", "--to lama is unknown; did you mean")}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_place_is_one_sentence_and_leaves_nothing(name, runs, tmp_path, capsys):
    run, to, why = REFUSED[name]
    path = runs(run).path
    assert main(["export", str(path), "--out", str(tmp_path / "out"), "--to", to]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_a_task_is_not_exported(tmp_path):
    config = load_config(None, TINY | {"task.name": "prefix-sums", "objective": "full"})
    train(config, tmp_path / "run")
    with pytest.raises(UserError, match="trained on a task, but only language models are exported"):
        export(load_run(tmp_path / "run"), tmp_path / "out")


def test_the_card_says_what_it_is_and_what_depth_does(runs, tmp_path, capsys):
    run = runs("truncated")
    assert main(["eval", str(run.path), "--depths", "1,4"]) == 0
    assert main(["export", str(run.path), "--out", str(tmp_path / "out"), "--licence", "apache-2.0"]) == 0
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run.path / "eval/depth.jsonl").read_text().splitlines()]
    for row in rows:
        if row["metric"] == "nats_per_token":
            assert f"| {row['depth']}" in card
            assert f"{row['mean']:.4f}" in card
    for said in ("license: apache-2.0", "rule: truncated", "text.txt", "3 steps", "num_steps", f"{run.spent.tokens:,}"):
        assert said in card
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not [word for word in json.dumps(config).split('"') if str(run.path.parent) in word]


def test_every_form_is_tried_here():
    assert set(FORMS) == {*MAKERS, "hf"}


@pytest.mark.parametrize("given", [None, {"kind": "linear", "factor": 4.0},
                                   {"kind": "llama3", "factor": 8.0, "original_length": 64, "low_freq_factor": 2.0},
                                   {"kind": "yarn", "factor": 4.0, "original_length": 64, "attention_factor": 1.2}],
                         ids=str)
def test_scaled_positions_are_read_as_they_were_written(given):
    model = ModelConfig(rope_scaling=given)
    found = scaling(rope_parameters(model), "a folder")
    assert (found and RopeScaling(**found)) == model.rope_scaling


def test_damped_steps_are_no_layers_of_another_family():
    for damping, why in ((0.5, "recurrence.damping 0.5 .* llama computes plain steps; export it --to hf"), (0, None)):
        config = load_config(None, {"objective": "full", "model.width": 16, "model.num_heads": 2,
                                    "recurrence.damping": damping})
        reader = LoopReader(build_objective(config, build(config, 20)), 0)
        with pytest.raises(UserError, match=why) if why else nullcontext():
            reader.check_layers("llama")


def donor(folder):
    """A Llama with two ends of text, a start token, a padding token, one more special token and a chat template."""
    words = byte_level()
    words.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_end|>"])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 330)])
    given = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                                 pad_token="<pad>", extra_special_tokens=["<|im_end|>"])
    given.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    given.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(given), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=330, eos_token_id=331, pad_token_id=332))
    model.generation_config.eos_token_id = [331, 333]
    model.save_pretrained(folder)
    return given


@pytest.mark.parametrize("to", ["hf", "llama"])
def test_a_tokenizer_from_elsewhere_goes_back_with_its_special_tokens_and_chat_template(to, tmp_path):
    theirs = donor(tmp_path / "donor")
    assert main(["import", str(tmp_path / "donor"), "--out", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    folder = export(run, tmp_path / "out", to)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("def f(x)").input_ids == theirs("def f(x)").input_ids
    chat = [{"role": "user", "content": "def"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [331, 333]
    assert (model.config.bos_token_id, model.config.pad_token_id) == (330, 332)
    assert run.objective.end_of_text == 331
    assert to == "llama" or model.objective.end_of_text == 331


def test_a_tokenizer_of_our_own_starts_ends_and_pads_with_its_end_of_text(runs, tmp_path):
    words = transformers.AutoTokenizer.from_pretrained(export(runs("truncated"), tmp_path / "out"))
    assert set(words.special_tokens_map.values()) == {runs("truncated").tokenizer.end_token}
    assert words.chat_template is None
