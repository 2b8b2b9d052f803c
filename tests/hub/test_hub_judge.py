"""A judge from transformers gives what transformers itself gives, to the text after the prompt alone, whatever the
writer's tokenizer; what cannot judge is refused in one sentence."""

import subprocess
import sys

import pytest
import torch
from tiny_models import TEXT, byte_level, gpt2, save

from looped.errors import UserError
from looped.evaluation.judge import Reader, continuation, judged_rows
from looped.hub.judge import HubJudge

PAIRS = [("def f3(x):\n", "    return x * 3"), ("    return", " x * 12  # na"),
         ("# naïve: 4 → ", "🙂 xxxx\ndef f9(x):")]


def decode_utf8(ids):
    """A writer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def in_bytes(texts):
    size = min(len(text.encode()) for text in texts)
    return torch.tensor([list(text.encode()[:size]) for text in texts])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def judge(request, folders):
    return HubJudge(folders[request.param], decode_utf8)


def reference(judge, text, first):
    """transformers' own loss of the tokens from `first` on, and cross-entropy shifted by hand in float64."""
    ids = torch.tensor([[judge.tokenizer.bos_token_id, *judge.tokenizer(text)["input_ids"]]])
    labels = ids.clone()
    labels[:, :first] = -100
    with torch.no_grad():
        theirs = judge.model(input_ids=ids, labels=labels)
    logits = theirs.logits[0].double()
    by_hand = sum(logits[i - 1].logsumexp(0) - logits[i - 1, ids[0, i]] for i in range(first, ids.shape[1]))
    assert theirs.loss.item() * (ids.shape[1] - first) == pytest.approx(by_hand.item(), rel=1e-5)
    return by_hand.item()


def test_nats_are_those_of_transformers(judge):
    assert isinstance(judge, Reader)
    texts = [(prompt + text, len(prompt)) for prompt, text in PAIRS]
    expected = [reference(judge, text, judge.tokens(text, start)[1]) for text, start in texts]
    torch.testing.assert_close(judge.nats(texts), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4)


def test_prompt_and_text_share_out_all_nats(judge):
    """Where the boundary falls between two tokens: nats from the start less nats from the boundary are the prompt's."""
    prompt, text = PAIRS[1]
    whole, rest = judge.nats([(prompt + text, 0), (prompt + text, len(prompt))]).tolist()
    assert whole - rest == pytest.approx(judge.nats([(prompt, 0)]).item(), rel=1e-4)
    assert rest > 1  # positive control: neither part is nothing


def test_a_token_across_the_boundary_is_the_texts(judge):
    ids = judge.tokenizer("return x")["input_ids"]
    text = judge.tokenizer.decode(ids[:1])
    assert len(text) > 1
    assert judge.tokens("return x", len(text) - 1)[1] == 1
    assert judge.tokens("return x", len(text))[1] == 2


def test_losses_are_nats_a_token_of_the_writer_and_bits_a_byte(judge):
    prompts, texts = in_bytes([p for p, _ in PAIRS]), in_bytes([t for _, t in PAIRS])
    losses = judge.read(prompts, texts).per_token
    nats = judge.nats([continuation(decode_utf8, *pair) for pair in zip(prompts.tolist(), texts.tolist(), strict=True)])
    torch.testing.assert_close(losses, nats / texts.shape[1])
    rows = {row.metric: row for row in judged_rows(judge, prompts, texts, decode_utf8, depth=2)}
    sizes = [len(text[start:].encode()) for text, start in (continuation(decode_utf8, *pair) for pair in zip(
        prompts.tolist(), texts.tolist(), strict=True))]
    assert rows["judged_bits_per_byte"].mean == pytest.approx(nats.sum().item() / sum(sizes) / 0.6931471805599453)
    assert rows["judged_nats"].mean == pytest.approx(losses.mean().item())
    assert rows["judged_nats"].by == judge.name


def test_a_writer_of_another_tokenizer_is_read_the_same(judge):
    """The same text out of bytes and out of another vocabulary: equal nats."""
    other = byte_level(vocab_size=300)
    prompt, text = PAIRS[1]
    texts = [torch.tensor([other.encode(t).ids]) for t in (prompt, text)]
    found = HubJudge(judge.name, other.decode).read(*texts).nats
    by_bytes = [torch.tensor([list(t.encode())]) for t in (prompt, text)]
    assert found.item() == pytest.approx((judge.read(*by_bytes).nats).item(), rel=1e-6)


def test_a_batch_reads_as_one_by_one(judge, monkeypatch):
    texts = [(prompt + text, len(prompt)) for prompt, text in PAIRS]
    together = judge.nats(texts)
    monkeypatch.setattr("looped.hub.judge.BATCH", 1)
    torch.testing.assert_close(judge.nats(texts), together, rtol=1e-5, atol=1e-5)


def test_a_character_cut_by_the_prompts_end_is_the_texts():
    ids = list("x→y".encode())
    assert continuation(decode_utf8, ids[:2], ids[2:]) == ("x→y", 1)
    assert continuation(decode_utf8, ids[:4], ids[4:]) == ("x→y", 2)
    assert continuation(decode_utf8, ids[:3], [65]) == ("x\ufffdA", 2)


def test_a_text_longer_than_the_judge_reads_is_refused(judge):
    with pytest.raises(UserError, match=r"at most 64 tokens.*sample_length"):
        judge.nats([(TEXT[:400], 10)])


def test_without_a_start_token_the_first_token_cannot_be_judged(tmp_path):
    judge = HubJudge(save(tmp_path, gpt2(), start=False), decode_utf8)
    assert judge.nats([("def f3", 4)]).item() > 0
    with pytest.raises(UserError, match="no start token"):
        judge.nats([("def f3", 0)])


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    bert = BertLMHeadModel(BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16, initializer_range=0.5, is_decoder=False))
    with pytest.raises(UserError, match="looks ahead"):
        HubJudge(save(tmp_path, bert), decode_utf8)


def break_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")


def pickle_weights(folder):
    torch.save(gpt2().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_weight(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_the_config(folder):
    (folder / "config.json").unlink()


def ask_for_code(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "gpt2"', '"model_type": "mine", "auto_map": '
                                                     '{"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}'))


@pytest.mark.parametrize(("harm", "why"), [
    (break_tokenizer, "cannot be loaded"), (break_weights, "cannot be loaded"), (pickle_weights, "safetensors"),
    (lose_a_weight, "no weights 'transformer.h.1.mlp.c_fc.weight'"), (lose_the_config, "neither a run"),
    (ask_for_code, "cannot be loaded")])
def test_a_damaged_folder_is_one_sentence(harm, why, tmp_path):
    name = save(tmp_path / "model", gpt2())
    HubJudge(name, decode_utf8)
    harm(tmp_path / "model")
    with pytest.raises(UserError, match=why) as error:
        HubJudge(name, decode_utf8)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("name", "why"), [("./nowhere", "does not exist"), ("no-such/model-here", "cannot be loaded"),
                                           ("a b c", "cannot be loaded")])
def test_a_name_that_leads_nowhere_is_one_sentence(name, why):
    with pytest.raises(UserError, match=why) as error:
        HubJudge(name, decode_utf8)
    assert "\n" not in str(error.value)


def test_without_transformers_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'looped\[hub\]'"):
        HubJudge("gpt2", decode_utf8)


def test_neither_help_nor_a_run_of_our_own_loads_transformers():
    code = ("import sys, looped.hub.eval_models, looped.evaluation.depth_sweep, looped.cli.eval; "
            "sys.exit(bool({'transformers', 'mauve', 'faiss'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
