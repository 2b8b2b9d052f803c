"""A tokenizer of bytes, as `tokenizers` trains it, for tests of files that hold one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [f"The quick brown fox {number} jumps over the lazy dog; naïve 🙂\n" * 5 for number in range(20)]


def byte_level(special_tokens):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=special_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return backend
