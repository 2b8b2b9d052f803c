"""`looped import`: a model's folder, or a repository of the hub, as a run that every verb takes; and what is no model
leaves nothing behind."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, byte_level

from looped.cli import main
from looped.errors import UserError
from looped.hub.exporting import export
from looped.hub.importing import import_model
from looped.training.checkpoint import Stream
from looped.training.runs import load_run, read_stamp

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("unchecked")

VOCAB = 352
SHORT = ["--data.length", "32", "--training.batch_size", "2", "--training.budget", "2", "--training.num_evals", "0",
         "--evaluation.num_sequences", "2", "--optim.warmup_steps", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small Llama of six layers, with more embeddings than its tokenizer has tokens."""
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0))
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **names).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(model, text, tmp_path_factory):
    """The model cut into 2/2/1, as a run with a text of its own."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    assert main(["import", str(model), "--out", str(out), "--layers", "2/2/1", "--data.path", str(text), *SHORT]) == 0
    return out


def test_a_run_is_the_model_that_was_imported(model, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    import_model(model, tmp_path / "run")
    run = load_run(tmp_path / "run")
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = run.objective.model(tokens, 1), theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert expected.std() > 1
    assert (run.step, run.tokenizer.vocab_size, run.objective.model.vocab_size) == (0, 330, VOCAB)


def test_its_greedy_text_is_that_of_transformers(model, tmp_path, capsys):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    words = transformers.AutoTokenizer.from_pretrained(model)
    import_model(model, tmp_path / "run")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "def f1(x):", "--num-tokens", "12", "--top-k", "1",
                 "--depth", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])["text"]
    ids = words("def f1(x):", return_tensors="pt").input_ids
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = words.decode(made[0, ids.shape[1]:])
    assert expected.startswith(found.removeprefix("def f1(x):"))
    assert len(found) > 5


@pytest.mark.parametrize("verb", [
    ["eval", "{run}", "--depths", "1,2"], ["info", "{run}"], ["plot", "{run}"],
    ["generate", "{run}", "--prompt", "def", "--num-tokens", "3"],
    ["bench", "step", "--config", "{run}/config.yaml", "--objectives", "truncated", "--repeats", "1"],
    ["train", "{run}/config.yaml", "--run", "{new}", "--training.warm_start", "{run}"],
    ["train", "{run}/config.yaml", "--run", "{new}", "--training.warm_start", "{run}", "--objective", "denoise"],
    ["train", "{run}/config.yaml"]], ids=lambda verb: " ".join(verb[:2] + verb[-1:]))
def test_every_verb_takes_it(verb, run, tmp_path, monkeypatch):
    """In this order: `plot` draws what `eval` has measured, and the last goes on training in the run's own folder."""
    monkeypatch.chdir(tmp_path)
    assert main([word.format(run=run, new=tmp_path / "new") for word in verb]) == 0


def test_a_run_that_starts_from_it_has_its_weights(run, tmp_path):
    """And one without has others: the control. What trained on in the run's own folder counts."""
    start = ["--training.budget", "1", "--optim.lr", "1e-12"]
    for name, flags in (("warm", ["--training.warm_start", str(run)]), ("cold", [])):
        assert main(["train", str(run / "config.yaml"), "--run", str(tmp_path / name), *start, *flags]) == 0
    first = load_run(run).objective.model.embed.weight
    warm, cold = (load_run(tmp_path / name).objective.model.embed.weight for name in ("warm", "cold"))
    torch.testing.assert_close(warm, first, rtol=0, atol=1e-9)
    assert not torch.allclose(cold, first, atol=1e-3)


def test_training_in_its_own_folder_remembers_what_it_learned_from(model, text, tmp_path):
    out = tmp_path / "run"
    import_model(model, out, settings={"data.path": str(text), "data.length": 32, "training.batch_size": 2,
                                       "training.budget": 1, "training.num_evals": 0})
    assert load_run(out).identity.fingerprint is None
    assert main(["train", str(out / "config.yaml")]) == 0
    after = load_run(out)
    assert (after.step, after.identity.fingerprint) == (1, after.data.fingerprint)


def test_a_repository_of_the_hub_is_read_from_its_cache(model, tmp_path, monkeypatch):
    """As `snapshot_download` lays it out; by name, and by name and revision."""
    import huggingface_hub.constants

    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(model, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for number, name in enumerate(["someone/tiny", f"someone/tiny@{'a' * 40}"]):
        assert import_model(name, tmp_path / f"run{number}").family == "llama"
    with pytest.raises(UserError, match="someone/other is not a local folder, and cannot be fetched from the"):
        import_model("someone/other", tmp_path / "none")


def test_the_end_of_a_text_is_that_of_the_config_where_no_tokenizer_declares_one(copy, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    grow(copy / "tokenizer.json", 2)
    change(copy, eos_token_id=[331, 330])
    import_model(copy, tmp_path / "run")
    assert load_run(tmp_path / "run").tokenizer.end_of_text == 331


@pytest.mark.parametrize(("card", "licence"), [
    ("---\nlicense: apache-2.0\ntags: []\n---\n# A model\n", "apache-2.0"), ("# A model\n", None),
    ("---\n: {\n---\n", None), (None, None)])
def test_the_licence_comes_along(card, licence, copy, tmp_path):
    if card is not None:
        (copy / "README.md").write_text(card)
    import_model(copy, tmp_path / "run")
    assert read_stamp(tmp_path / "run")["imported"]["licence"] == licence
    export(load_run(tmp_path / "run"), tmp_path / "out")
    assert f"licence: {licence or 'not stated'}" in (tmp_path / "out/README.md").read_text()


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without(name):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def with_another(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"another": torch.ones(3)}, folder / "model.safetensors")


def in_shards(folder):
    """The second half of the tensors in model-2.safetensors."""
    tensors, places = load_file(folder / "model.safetensors"), {}
    names = sorted(tensors)
    for number, part in ((1, names[:20]), (2, names[20:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def shard_cut_short(folder):
    in_shards(folder)
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_missing(folder):
    in_shards(folder)
    (folder / "model-2.safetensors").unlink()


def quantised(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")


NOT_MODELS = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), [], "has no tokenizer.json"),
    "another's tokenizer": (lambda f: grow(f / "tokenizer.json"), [],
                            "has 352 embeddings, but its tokenizer has .* tokens; give .* with --tokenizer"),
    "a last tensor missing": (without("model.norm.weight"), [], "has no tensor model.norm.weight"),
    "a tensor too many": (with_another, [], "holds another, which has no place in its family"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "model.bin"), [], "pickles, which are not read"),
    "cut short": (cut_short, [], "cut short or damaged"),
    "a shard cut short": (shard_cut_short, [], "model-2.* is cut short or damaged"),
    "a shard missing": (shard_missing, [], "has no model-2.safetensors; fetch the folder again"),
    "quantised": (quantised, [], "has model.norm.weight as F8_E4M3, a quantised model"),
    "a config that lies": (lambda f: change(f, hidden_size=64), [], "of shape .* but by its config.json it is"),
    "an objective with weights of its own": (lambda f: None, ["--objective", "denoise"], "weight"),
    "other sizes": (lambda f: None, ["--model.width", "64"], "of shape .* but by its config.json"),
    "an unknown setting": (lambda f: None, ["--model.widht", "64"], "unknown setting 'model.widht'"),
    "a cut too deep": (lambda f: None, ["--layers", "4/4/4"], "asks for 12 layers"),
    "no such tokenizer": (lambda f: None, ["--tokenizer", "/none"], "/none.* cannot be read")}


def grow(path, num=40):
    fields = json.loads(path.read_text())
    fields["added_tokens"] += [{**fields["added_tokens"][0], "id": 330 + n, "content": f"<{n}>"} for n in range(num)]
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", NOT_MODELS)
def test_what_is_no_model_is_one_sentence_and_leaves_nothing(name, copy, tmp_path, capsys):
    damage, flags, why = NOT_MODELS[name]
    damage(copy)
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(copy), "--out", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(why, said), said
    assert "cannot write" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_exists_is_left_as_it_is(model, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another --out"):
        import_model(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_path_that_is_none_is_not_looked_for_on_the_hub(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(UserError, match="is not a model's folder"):
            import_model(name, tmp_path / "run")


def test_tensors_written_one_by_one_are_read_by_safetensors(tmp_path):
    """In another order than they are said in, of no rows and of no axis; the file is what save_file would hold."""
    torch.manual_seed(0)
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2, 2, 2).transpose(0, 2), "none": torch.zeros(0, 4),
               "one": torch.tensor(7.0)}
    Stream({name: tensor.shape for name, tensor in tensors.items()}, reversed(tensors.items())).write(tmp_path / "f")
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "f", "pt") as file:
        assert file.get_slice("a").get_dtype() == "F32"
