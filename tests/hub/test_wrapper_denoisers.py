"""Denoisers behind transformers' interface: their texts, samples, likelihoods and caches; and what they refuse."""

import pytest
import torch
from test_wrapper import RULES, VOCAB, looped, tokens, written

from looped.errors import UserError
from looped.inference.generate import generate
from looped.inference.text_denoising import TeacherForced
from looped.rng import StepRandom

transformers = pytest.importorskip("transformers")
from looped.hub.wrapper import LoopedForCausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("unchecked")

DENOISERS = {name: {"denoise.context": name} for name in ("inject", "concat", "context")}


def denoiser(name):
    return looped({"objective": "denoise"} | DENOISERS[name])


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_writes_the_likeliest_text_that_looped_generate_writes(name):
    model, ids = denoiser(name), tokens(rows=1)
    ours = generate(model.objective, ids, num_tokens=7, depth=5, temperature=0)
    assert torch.equal(written(model, ids), ours)
    assert not torch.equal(written(model, ids, num_steps=1), ours)


@pytest.mark.parametrize("how", [
    lambda model, **settings: ((transformers.GenerationConfig(**settings),), {}),
    lambda model, **settings: ((), {"generation_config": transformers.GenerationConfig(**settings)}),
    lambda model, **settings: ((), model.generation_config.update(**settings) or {}),
    lambda model, **settings: ((), settings)], ids=["positional", "keyword", "of the model", "alone"])
def test_settings_of_generate_count_wherever_they_are_given(how):
    """Greedy search and the cache of a denoiser depend on them."""
    model, ids = denoiser("inject"), tokens(rows=1)
    model.generation_config.update(pad_token_id=0, do_sample=True)
    given, named = how(model, do_sample=False, max_new_tokens=7)
    found = model.generate(ids, *given, **named, num_steps=5, attention_mask=torch.ones_like(ids))
    assert torch.equal(found[:, 10:], generate(model.objective, ids, num_tokens=7, depth=5, temperature=0))
    given, named = how(model, use_cache=False)
    with pytest.raises(UserError, match="generates with its cache"):
        model.generate(ids, *given, **named)


def test_a_setting_that_is_left_unset_is_the_models():
    """Sampled by default, a denoiser does not take the most likely token of each noise level."""
    model, seen = denoiser("inject"), []
    model.generation_config.update(pad_token_id=0, do_sample=True, use_cache=False)
    for given in ((), (transformers.GenerationConfig(max_new_tokens=3),)):
        with pytest.raises(UserError, match="generates with its cache"):
            model.generate(tokens(rows=1), *given)
    model.generation_config.use_cache = True
    writer = model.reader.writer
    model.reader.writer = lambda reading, params: seen.append(params.temperature) or writer(reading, params)
    model.generate(tokens(rows=1), transformers.GenerationConfig(max_new_tokens=3))
    model.generate(tokens(rows=1), max_new_tokens=3, do_sample=False)
    assert seen == [1, 0]


def sampled(model, ids, seed, num=1, **how):
    torch.manual_seed(seed)
    how = {"max_new_tokens": 7, "do_sample": True, "pad_token_id": 0, "num_steps": 4, "top_k": 0} | how
    found = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=num, **how)
    return found[:, ids.shape[1]:]


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_samples_by_torchs_seed_with_noise_for_each_row(name):
    model, ids = denoiser(name), tokens(rows=1)
    assert torch.equal(sampled(model, ids, 1, num=3), sampled(model, ids, 1, num=3))
    assert len({tuple(sampled(model, ids, seed)[0].tolist()) for seed in range(6)}) == 6
    assert len(sampled(model, ids, 1, num=6).unique(dim=0)) == 6
    likeliest = written(model, ids, num_steps=4)
    assert torch.equal(sampled(model, ids, 7, do_sample=False), likeliest)
    assert torch.equal(sampled(model, ids, 7, top_k=1), sampled(model, ids, 7, temperature=1e-9))


@pytest.mark.parametrize(("how", "other"), [({"temperature": 1.0}, {"temperature": 0.2}), ({"temperature": 0.2}, {}),
                                            ({"temperature": 4.0, "top_p": 0.2}, {"top_p": 1.0})], ids=str)
def test_a_denoiser_draws_tokens_as_often_as_the_sampler_of_looped_generate(how, other):
    """Positive control: other settings draw others."""
    model, ids, num = denoiser("inject"), tokens(rows=1), 1000

    def shares(texts):
        return torch.bincount(texts[:, 0], minlength=VOCAB) / num

    expected = shares(model.write(ids.repeat(num, 1), 1, 4, **how))
    found, others = (shares(sampled(model, ids, 0, num=num, max_new_tokens=1, **each)) for each in (how, other))
    assert (found - expected).abs().sum() < 0.3
    assert (others - expected).abs().sum() > 0.6


@pytest.mark.parametrize("rule", ["denoise", "truncated"])
def test_the_sampler_is_that_of_looped_generate(rule, tmp_path):
    model = looped({"objective": rule})
    model.save_pretrained(tmp_path)
    again = LoopedForCausalLM.from_pretrained(tmp_path)
    how = {"temperature": 0.8, "top_k": 20, "seed": 5}
    ours = generate(model.objective, tokens(), num_tokens=7, depth=4, **how)
    assert torch.equal(again.write(tokens(), 7, 4, **how), ours)


@torch.no_grad()
@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoisers_prompts_of_several_lengths_are_continued_as_one_by_one(name):
    model, ids = denoiser(name).double(), tokens(rows=2)
    mask = torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    together = written(model, ids, attention_mask=mask)
    assert torch.equal(together[1], written(model, ids[1:, 4:])[0])


@torch.no_grad()
def test_a_denoisers_logits_see_earlier_tokens_alone_and_no_batch():
    model, ids = denoiser("inject").double(), tokens(rows=3)
    whole = model(ids).logits
    other = ids.clone()
    other[:, 6:] = ids[:, 6:].roll(1, 0)
    torch.testing.assert_close(model(other).logits[:, :6], whole[:, :6], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(other).logits[:, 6:], whole[:, 6:], atol=1e-4)
    torch.testing.assert_close(model(ids[2:]).logits, whole[2:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoisers_likelihood_is_that_at_sigma_max_at_any_depth(name):
    """It is the first readout of a solver. Positive control: the last one knows which token the solver has drawn."""
    model, ids = denoiser(name).double(), tokens()
    solver = TeacherForced(model.objective, torch.cat([ids, ids[:, -1:]], dim=1))
    random = StepRandom(model.config.settings.seed, 0, count=2, rows=[0, 0])
    first, last = (solver.logits(depth, random, "") for depth in (1, 6))
    for depth in (1, 6):
        found = model(ids, labels=ids, num_steps=depth)
        torch.testing.assert_close(found.logits, first)
        assert found.loss < torch.nn.functional.cross_entropy(last[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) - 1


@pytest.mark.parametrize(("how", "why"), [({"num_beams": 2}, "has no beam search"),
                                          ({"prompt_lookup_num_tokens": 2}, "no speculative decoding"),
                                          ({"do_sample": True, "min_p": 0.1}, "all that min_p would change"),
                                          ({"use_cache": False}, "generates with its cache")], ids=str)
def test_what_a_denoiser_cannot_do_is_one_sentence(how, why):
    with pytest.raises(UserError, match=why):
        written(denoiser("inject"), tokens(rows=1).repeat(1, 3), **how)


def test_a_denoiser_is_not_trained_by_its_logits():
    with pytest.raises(UserError, match="is not trained by its logits; train it with looped train"):
        denoiser("inject").train()(tokens(), labels=tokens())


@pytest.mark.parametrize(("settings", "why"), [
    ({"objective": "masked"}, "predicts no next token"),
    ({"objective": "denoise", "denoise.block_size": 4, "denoise.context": "concat"}, "predicts 4 tokens at a time")])
def test_rules_without_a_next_token_are_refused(settings, why):
    with pytest.raises(UserError, match=why):
        looped(settings)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{"objective": "denoise"}, {"objective": "blockwise", "blocks.num": 2},
                                      {"objective": "denoise", "denoise.noise.distribution": "adaptive"}], ids=str)
def test_a_saved_denoiser_can_be_read_in_half_precision(settings, dtype, tmp_path):
    full = looped(settings)
    full.save_pretrained(tmp_path)
    model = LoopedForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    loss, rough = (each(tokens(), labels=tokens()).loss.float() for each in (full, model))
    torch.testing.assert_close(rough, loss, rtol=0.02, atol=0.02)
    assert written(model, tokens()).shape == (2, 7)
    kept = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.float64}
    assert kept == {name for name, buffer in full.named_buffers() if buffer.dtype == torch.float64}


@torch.no_grad()
def test_a_denoiser_goes_on_with_its_own_cache_alone():
    model, loop = denoiser("context"), looped(RULES["truncated"])
    other = loop(tokens(), num_steps=2, use_cache=True).past_key_values
    with pytest.raises(UserError, match="cannot use this DynamicCache"):
        model(tokens()[:, :1], num_steps=2, past_key_values=other)
    for empty in (None, transformers.DynamicCache()):
        kept = model(tokens(), num_steps=2, past_key_values=empty, use_cache=True).past_key_values
        assert model(tokens()[:, :1], num_steps=2, past_key_values=kept).logits.shape == (2, 1, VOCAB)


@torch.no_grad()
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_generate_goes_on_with_a_denoisers_cache(do_sample):
    model = denoiser("context")
    how = {"do_sample": do_sample, "pad_token_id": 0, "eos_token_id": None, "num_steps": 2}

    def write(ids, num, **cache):
        return model.generate(ids, max_new_tokens=num, return_dict_in_generate=True, **how, **cache)

    torch.manual_seed(0)
    whole = write(tokens(), 6).sequences
    torch.manual_seed(0)
    half = write(tokens(), 3)
    rest = write(half.sequences, 3, past_key_values=half.past_key_values)
    assert torch.equal(rest.sequences, whole)
    with pytest.raises(UserError, match="goes on from its cache by one token; give new tokens one after another"):
        write(torch.cat([rest.sequences, tokens()], dim=1), 1, past_key_values=rest.past_key_values)


def test_paged_caches_are_refused():
    for model in (denoiser("context"), looped(RULES["truncated"])):
        with pytest.raises(UserError, match=r"^a looped model has no continuous batching"):
            model.generate(tokens(), cache_implementation="paged", max_new_tokens=2, num_steps=2)


def test_a_denoisers_vocabulary_stays():
    with pytest.raises(UserError, match="its vocabulary stays as it is"):
        denoiser("context").resize_token_embeddings(VOCAB + 7)
