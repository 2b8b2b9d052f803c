"""`LoopedForCausalLM`: models of this package behind transformers' interface give the same figures with a cache and
without, in a batch and alone, saved and read back; what cannot be is one sentence, and nothing is wrong in silence."""

import copy
import json
import subprocess
import sys

import looped_folders
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained import change, saved

from looped.config import load_config
from looped.errors import UserError
from looped.hub.families import read_pretrained
from looped.inference.generate import generate
from looped.models.build import build
from looped.objectives import build_objective

transformers = pytest.importorskip("transformers")
from looped.hub.wrapper import LoopedConfig, LoopedForCausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("unchecked")

VOCAB = looped_folders.VOCAB
TINY = {"model.width": 32, "model.num_heads": 4, "model.ffn_width": 48, "data.length": 32, "recurrence.mean": 3}
RULES = {
    "truncated": {"objective": "truncated"}, "embedding": {"objective": "full", "model.state_init": "embedding"},
    "untied": {"objective": "full", "model.tie_embeddings": False}, "no prelude": {
        "objective": "full", "model.num_prelude_layers": 0}, "ar": {"objective": "ar"},
    "blocks": {"objective": "full", "blocks.num": 2, "recurrence.mean": 4}, "boundary": {
        "objective": "full", "model.step_embedding": "modulate", "model.loop_scale": "update", "model.streams": 2,
        "model.stream_mixing": "dynamic"}}


def looped(settings, end=None):
    """A model of this package with random weights, gains and all."""
    config = load_config(None, TINY | settings)
    objective = build_objective(config, build(config, VOCAB), end).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in objective.parameters():
            weight.add_(0.15 * torch.randn(weight.shape, generator=generator))
    return held(objective, config)


def held(objective, config):
    settings = LoopedConfig(config.model_dump(mode="json"), num_steps=config.main_depth,
                            vocab_size=objective.model.vocab_size, eos_token_id=objective.end_of_text, pad_token_id=0)
    return LoopedForCausalLM.holding(objective, settings).eval()


def imported(name, folder):
    makers = {"llama": lambda: saved(folder), "huginn": lambda: looped_folders.huginn(folder),
              "retrofit": lambda: looped_folders.retrofit(folder, adapter=looped_folders.draw(7)(32, 64, scale=0.1)),
              "ouro": lambda: looped_folders.ouro(folder), "nanbeige": lambda: saved(folder)}
    makers[name]()
    if name == "nanbeige":
        change(folder, model_type="nanbeige", num_loops=2)
    model, config = read_pretrained(folder, layers="2/2/1" if name == "llama" else None)
    return held(build_objective(config, model, None).eval(), config)


FAMILIES = ["llama", "huginn", "retrofit", "ouro", "nanbeige"]


@pytest.fixture(scope="module", params=[*FAMILIES, *RULES])
def model(request, tmp_path_factory):
    """In float64."""
    name, folder = request.param, tmp_path_factory.mktemp("imported")
    return (imported(name, folder) if name in FAMILIES else looped(RULES[name])).double()


def tokens(rows=2, length=10, seed=1):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def written(model, ids, **how):
    torch.manual_seed(0)
    how = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_steps": 5} | how
    mask = how.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1]:]


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 4, 8])
def test_new_tokens_beside_a_cache_get_the_logits_of_the_whole_text(model, depth):
    whole = model(tokens(), num_steps=depth).logits
    first = model(tokens()[:, :6], num_steps=depth, use_cache=True)
    rest = model(tokens()[:, 6:], num_steps=depth, past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, rtol=1e-9, atol=1e-9)
    assert whole.std() > 0.01


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True},
                                 {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_texts_are_the_same_with_a_cache_and_without(model, how):
    assert torch.equal(written(model, tokens(), **how), written(model, tokens(), use_cache=False, **how))


def test_guesses_from_the_prompt_change_no_text(model):
    ids = tokens(rows=1, length=4).repeat(1, 3)
    assert torch.equal(written(model, ids, prompt_lookup_num_tokens=3), written(model, ids))


@torch.no_grad()
def test_prompts_of_several_lengths_are_continued_as_one_by_one(model):
    """Padded on the left; whatever the padding says, and though an initial state may be random."""
    ids, lengths = tokens(rows=3), [10, 4, 7]
    mask = torch.tensor([[0] * (10 - n) + [1] * n for n in lengths])
    together = written(model, torch.where(mask.bool(), ids, 59), attention_mask=mask)
    for row, n in enumerate(lengths):
        assert torch.equal(together[row], written(model, ids[row : row + 1, 10 - n:])[0])


@torch.no_grad()
def test_a_row_gets_the_same_in_any_batch(model):
    """Two calls draw the same, and each row as if it were alone."""

    whole = model(tokens(rows=3)).logits
    torch.testing.assert_close(model(tokens(rows=3)).logits, whole, rtol=0, atol=0)
    torch.testing.assert_close(model(tokens(rows=3)[1:2]).logits, whole[1:2], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_is_saved_is_read_back_bit_for_bit(model, tmp_path):
    """With several files as with one; and buffers that no file holds are as they were."""
    model = copy.deepcopy(model).float()
    for name, how in (("one", {}), ("several", {"max_shard_size": "20KB"})):
        model.save_pretrained(tmp_path / name, **how)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        assert again.state_dict().keys() == model.state_dict().keys()
        for (key, ours), (_, theirs) in zip(model.named_buffers(), again.named_buffers(), strict=True):
            assert torch.equal(ours, theirs), key
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1


@torch.no_grad()
def test_a_saved_model_can_be_read_in_bfloat16_and_its_angles_stay(tmp_path):
    looped(RULES["truncated"]).save_pretrained(tmp_path)
    model = LoopedForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    moved = LoopedForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16)
    assert torch.equal(moved(tokens()).logits, model(tokens()).logits)
    assert model.objective.model.rotary.frequencies.dtype == torch.float32
    full = LoopedForCausalLM.from_pretrained(tmp_path)
    loss, rough = (each(tokens(), labels=tokens()).loss.float() for each in (full, model))
    torch.testing.assert_close(rough, loss, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_num_steps_is_a_setting_of_config_of_reading_of_a_call_and_of_generate(tmp_path):
    model = looped(RULES["truncated"])
    model.save_pretrained(tmp_path)
    deep = LoopedForCausalLM.from_pretrained(tmp_path, num_steps=7)
    assert (model.config.num_steps, deep.config.num_steps) == (3, 7)
    assert torch.equal(deep(tokens()).logits, model(tokens(), num_steps=7).logits)
    assert not torch.allclose(deep(tokens()).logits, model(tokens()).logits, atol=1e-3)
    deep.config.num_steps = 3
    assert torch.equal(deep(tokens()).logits, model(tokens()).logits)
    wanted = written(model, tokens(), num_steps=16)
    assert torch.equal(written(deep, tokens(), num_steps=16), wanted)
    settings = transformers.GenerationConfig(num_steps=16, max_new_tokens=7, do_sample=False, pad_token_id=0)
    for call, steps in ({}, 16), ({"num_steps": 5}, 5):
        torch.manual_seed(0)
        found = model.generate(tokens(), generation_config=settings, **call)
        assert torch.equal(found[:, tokens().shape[1]:], written(model, tokens(), num_steps=steps))
    assert not torch.equal(written(model, tokens()), wanted)
    with pytest.raises(UserError, match="logits_to_keep must be a whole number"):
        model(tokens(), logits_to_keep=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="num_step"):
        written(model, tokens(), num_step=4)
    with pytest.raises(UserError, match="num_steps"):
        written(model, tokens(), num_steps=0)


def test_a_cache_grows_past_the_layers_that_transformers_makes():
    model = looped(RULES["truncated"])
    kept = model(tokens(), num_steps=9, use_cache=True).past_key_values
    c = model.config.settings.model
    assert len(kept.layers) == c.num_prelude_layers + 9 * c.num_core_layers + c.num_coda_layers
    assert kept.get_seq_length() == 10


@pytest.mark.parametrize("rule", ["truncated", "denoise"])
def test_a_cache_of_another_depth_is_refused(rule):
    model = looped({"objective": rule})
    kept = model(tokens(), num_steps=2, use_cache=True).past_key_values
    with pytest.raises(UserError, match="filled with num_steps 2 and is read with 5"):
        model(tokens()[:, :1], num_steps=5, past_key_values=kept)


@pytest.mark.parametrize(("rule", "why"), [("truncated", "StaticCache has a fixed number of layers"),
                                           ("denoise", "makes a cache of its own, and cannot use this StaticCache")])
def test_a_static_cache_is_refused(rule, why):
    with pytest.raises(UserError, match=why):
        written(looped({"objective": rule}), tokens(), cache_implementation="static")


@torch.no_grad()
def test_labels_of_tokens_without_logits_are_refused():
    """And with a cache a loop has logits of all tokens."""
    with pytest.raises(UserError, match=r"labels have shape \(2, 10\), but the logits \(2, 1\)"):
        looped({"objective": "denoise"})(tokens(), labels=tokens(), use_cache=True)
    loop = looped(RULES["truncated"])
    with pytest.raises(UserError, match="leave logits_to_keep out"):
        loop(tokens(), labels=tokens(), logits_to_keep=2)
    losses = [loop(tokens(), labels=tokens(), use_cache=cached).loss for cached in (True, False)]
    torch.testing.assert_close(*losses)


@torch.no_grad()
def test_padding_on_the_right_is_refused_where_text_is_to_follow_and_changes_nothing_where_not():
    model = looped(RULES["truncated"])
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    with pytest.raises(UserError, match="padded on the right, where new tokens follow; pad it on the left"):
        written(model, tokens(), attention_mask=mask)
    padded = model(torch.where(mask.bool(), tokens(), 0), attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :6], model(tokens()[1:, :6]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["embedding", "untied"])
@pytest.mark.parametrize("rows", [VOCAB + 7, VOCAB - 7])
def test_a_resized_vocabulary_is_one_everywhere(rule, rows, tmp_path):
    """In logits, losses, the folder and the model that is read back; the old tokens keep their logits."""
    model = looped(RULES[rule])
    before, shared = model(tokens()).logits, min(rows, VOCAB)
    ids = tokens() % shared
    model.resize_token_embeddings(rows, mean_resizing=False)
    ids[:, -1] = rows - 1
    found = model(ids, labels=ids)
    assert found.logits.shape == (2, 10, rows)
    assert found.loss > 0
    if rows > VOCAB:
        torch.testing.assert_close(model(tokens()).logits[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    again = LoopedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids, labels=ids).logits, found.logits)
    assert again.config.vocab_size == again.objective.model.vocab_size == rows
    assert written(again, ids).shape == again.write(ids, 7).shape == (2, 7)


@torch.no_grad()
def test_the_output_is_a_tuple_if_none_else_is_wanted():
    model = looped(RULES["truncated"])
    whole = model(tokens(), labels=tokens())
    loss, logits = model(tokens(), labels=tokens(), return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)
    model.config.return_dict = False
    assert torch.equal(model(tokens())[0], whole.logits)
    assert torch.equal(model(tokens(), return_dict=True).logits, whole.logits)


@torch.no_grad()
def test_a_mask_may_be_of_floats_or_booleans():
    model, mask = looped(RULES["truncated"]), torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    expected = model(tokens(), attention_mask=mask).logits
    for dtype in (torch.float32, torch.bool):
        assert torch.equal(model(tokens(), attention_mask=mask.to(dtype)).logits, expected)


@pytest.mark.parametrize("shape", [(3, 2), (10,), (1, 1, 10, 10), (2, 9), (1, 10)], ids=str)
def test_a_mask_of_ones_of_another_shape_is_refused(shape):
    with pytest.raises(UserError, match="attention_mask has shape"):
        looped(RULES["truncated"])(tokens(), attention_mask=torch.ones(shape))


def test_masks_with_holes_and_of_other_sizes_are_refused():
    model = looped(RULES["truncated"])
    for mask, why in (([[1, 0, 1], [1, 1, 1]], "padding between real tokens"), ([[1, 1], [1, 0]], "has shape")):
        with pytest.raises(UserError, match=why):
            model(tokens()[:, :3], attention_mask=torch.tensor(mask))
    with pytest.raises(UserError, match="reads input_ids, not inputs_embeds; pass input_ids alone"):
        model(attention_mask=torch.ones(1, 2))


def test_a_folder_that_lacks_a_weight_or_has_one_too_many_is_refused(tmp_path):
    looped(RULES["truncated"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "objective.model.norm.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the tensor {name}"):
        LoopedForCausalLM.from_pretrained(tmp_path)
    save_file(tensors | {"extra": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="should not have the tensor extra"):
        LoopedForCausalLM.from_pretrained(tmp_path)


def test_a_tied_head_is_saved_once_and_an_untied_one_as_itself(tmp_path):
    for name, expected in (("truncated", 0), ("untied", 1)):
        looped(RULES[name]).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert sum(tensor.shape == (VOCAB, 32) for tensor in tensors.values()) == 1 + expected


def test_the_code_in_a_folder_reads_it_where_nothing_has_registered_it(tmp_path):
    looped(RULES["truncated"]).save_pretrained(tmp_path / "a")
    code = ("import sys, torch; from transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            "assert 'looped.hub.wrapper' == type(model).__module__\n"
            "model.save_pretrained(sys.argv[2])")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")], check=True,
                   capture_output=True)
    left = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "ab"]
    assert left[0] == left[1]
    assert (tmp_path / "b/modeling_looped.py").read_text() == (tmp_path / "a/modeling_looped.py").read_text()
    assert json.loads((tmp_path / "b/config.json").read_text())["auto_map"] == json.loads(
        (tmp_path / "a/config.json").read_text())["auto_map"]


@torch.no_grad()
@pytest.mark.parametrize("place", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map_puts_it_where_it_says(place, tmp_path):
    model = looped(RULES["truncated"])
    model.save_pretrained(tmp_path)
    again = LoopedForCausalLM.from_pretrained(tmp_path, device_map=place)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
def test_positions_of_several_texts_in_one_row_are_refused_and_those_that_follow_from_the_mask_taken():
    model, place = looped(RULES["truncated"]), torch.arange(10)
    whole = model(tokens()).logits
    assert torch.equal(model(tokens(), position_ids=place.expand(2, -1)).logits, whole)
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    follow = torch.stack([place, torch.tensor([1, 1, 1, *range(7)])])  # transformers fills empty columns with ones
    assert torch.equal(model(tokens(), attention_mask=mask, position_ids=follow).logits,
                       model(tokens(), attention_mask=mask).logits)
    with pytest.raises(UserError, match="position_ids do not follow from the attention_mask"):
        model(tokens(), position_ids=torch.tensor([[*range(5), *range(5)]] * 2))


def test_padding_on_the_left_is_refused_in_training():
    """It would be read as text; on the right it is seen by nobody, and its labels do not count."""
    model = looped(RULES["embedding"]).train()
    left, right = torch.tensor([[1] * 10, [0] * 4 + [1] * 6]), torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    with pytest.raises(UserError, match="without padding on the left; pad on the right"):
        model(tokens(), attention_mask=left, labels=tokens())
    labels = torch.where(right.bool(), tokens(), -100)
    losses = [model(torch.where(right.bool(), tokens(), filler), attention_mask=right, labels=labels).loss
              for filler in (0, 7)]
    assert losses[0] == losses[1]


def test_a_loop_writes_the_likeliest_text_that_looped_generate_writes():
    model = looped(RULES["truncated"])
    ours = generate(model.objective, tokens(rows=1), num_tokens=7, depth=5, temperature=0)
    assert torch.equal(written(model, tokens(rows=1)), ours)


# ---- documents ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_documents_that_were_kept_separate_stay_so():
    """A text after an end of text gets the logits that it has alone, and a cache refuses what it cannot tell apart."""
    model = looped(RULES["embedding"] | {"data.documents": "separate"}, end=0).double()
    ids = tokens(rows=1)
    ids[0, 4] = 0
    together = model(ids).logits
    packed = looped(RULES["embedding"], end=0).double()(ids).logits
    torch.testing.assert_close(together[:, 4:], model(ids[:, 4:]).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together[:, 6:], packed[:, 6:], atol=1e-6)
    with pytest.raises(UserError, match=r"data.documents separate, but a cache holds one document"):
        written(model, ids)
    assert written(model, ids[:, 4:]).shape == (1, 7)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:, 5:]], dim=1)  # filled up with ends of text
    mask = (torch.arange(padded.shape[1]) >= 3).long().unsqueeze(0)
    assert torch.equal(written(model, padded, attention_mask=mask), written(model, ids[:, 5:]))
