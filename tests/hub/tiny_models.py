"""Tiny models of transformers, built from configs with a tokenizer of their own and saved to a folder: nothing is
fetched."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "".join(f"def f{i}(x):\n    return x * {i}  # naïve: {i * i} → 🙂 {'x' * (i % 7)}\n" for i in range(200))


def byte_level(vocab_size=330, trim=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return backend


def save(folder, model, *, start=True, trim=False):
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} if start else {}
    PreTrainedTokenizerFast(tokenizer_object=byte_level(trim=trim), **names).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def gpt2(**settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                                      initializer_range=0.5, **settings)).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, initializer_range=0.5,
                                        max_position_embeddings=64)).eval()
