"""Exported models are trained by other people's tools: transformers' Trainer, gradient checkpointing, peft's LoRA."""

import copy

import pytest
import torch
from test_wrapper import RULES, VOCAB, looped, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from looped.errors import UserError
from looped.nn import layers

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("unchecked")


class Texts(torch.utils.data.Dataset):
    """The same eight texts, whose next token is the one before plus one."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        ids = (torch.arange(12) + 5 * number) % (VOCAB - 1) + 1
        return {"input_ids": ids, "labels": ids}


def trained(model, folder, steps=30, **settings):
    """(the losses that were logged, the model) after so many steps."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", **settings)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("rule", ["truncated", "embedding"])
def test_the_trainer_of_transformers_trains_it(rule, tmp_path):
    losses = trained(looped(RULES[rule]), tmp_path)
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    """And it is at work: layers say so, and backward runs them again."""
    plain = looped(RULES["embedding"]).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    assert saving.is_gradient_checkpointing
    assert not plain.is_gradient_checkpointing
    runs = {}
    for name, model in (("plain", plain), ("saving", saving)):
        counted = []
        for module in model.modules():
            if type(module).__name__ == "FeedForward":
                module.in_.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        model(tokens(), labels=tokens()).loss.backward()
        runs[name] = len(counted)
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert runs["saving"] > runs["plain"]
    assert trained(looped(RULES["embedding"]), tmp_path, steps=2, gradient_checkpointing=True)


def test_the_settings_of_gradient_checkpointing_may_say_what_is_done_anyway(tmp_path):
    model = looped(RULES["embedding"])
    assert trained(model, tmp_path, steps=1, gradient_checkpointing=True,
                   gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    with pytest.raises(UserError, match="leave other settings of gradient checkpointing out"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def dropped(model):
    """With LoRA whose dropout has one seed: the gradient of all its weights, in a row."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
        r=2, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)).train()
    torch.manual_seed(1)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in adapted.parameters() if weight.requires_grad])


def test_gradient_checkpointing_drops_the_same_again(monkeypatch):
    """Positive control: without the random state of the forward pass, backward drops others."""
    plain = looped(RULES["embedding"])
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    expected = dropped(plain)
    torch.testing.assert_close(dropped(saving), expected)
    monkeypatch.setattr(layers, "checkpoint", lambda run, *inputs, **how: checkpoint(
        run, *inputs, **how | {"preserve_rng_state": False}))
    assert (dropped(saving) - expected).norm() > 0.2 * expected.norm()


def test_gradients_go_through_the_last_steps_that_the_rule_says():
    """With one step of five the embedding's gradient is another one than with all of them."""
    found = {}
    for backprop in (1, 8):
        model = looped({"objective": "truncated", "recurrence.backprop": backprop, "model.state_init": "embedding"})
        model.train()(tokens(), labels=tokens(), num_steps=5).loss.backward()
        found[backprop] = model.get_input_embeddings().weight.grad
    assert not torch.allclose(found[1], found[8], rtol=1e-2)


def linears(model):
    """The names of all linear layers, by their last part and the part of the model they are in."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {f"{name.split('.')[2]} {name.rpartition('.')[2]}": name for name in found}


LINEAR = linears(looped(RULES["untied"]))


@torch.no_grad()
@pytest.mark.parametrize("name", LINEAR)
def test_lora_on_any_linear_layer_has_an_effect(name):
    """Also on those whose weights our own lean products read; merged it computes the same."""
    model = looped(RULES["untied"])
    before = model(tokens()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[LINEAR[name]], init_lora_weights=False))
    after = adapted(input_ids=tokens()).logits
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(adapted.merge_and_unload()(tokens()).logits, after, rtol=1e-3, atol=1e-4)


def test_lora_on_all_linear_layers_is_trained_saved_and_read(tmp_path):
    model = looped(RULES["embedding"])
    base = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    hit = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert hit == {"q", "k", "v", "out", "in_", "mix"}
    losses = trained(adapted, tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens()).logits, adapted(input_ids=tokens()).logits)
        written = again.generate(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=4,
                                 num_steps=6, do_sample=False, pad_token_id=0)
    assert written.shape == (2, 14)
