"""Models of this package as transformers models: `LoopedForCausalLM`, with all methods of a causal language model.

    from looped.hub.wrapper import LoopedForCausalLM    # also registers it for AutoModelForCausalLM

    model = LoopedForCausalLM.from_pretrained("out", num_steps=16)
    model.generate(**tokenizer("def", return_tensors="pt"), num_steps=32)

`num_steps`, loop steps or solver steps per token, is set in the config, in `from_pretrained`, in a `GenerationConfig`,
in `generate` or in a call; the later ones override the earlier ones.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from looped.config import Config
from looped.errors import UserError
from looped.hub.caches import KEEPING
from looped.hub.logits_api import PLAIN, Manner, Reader, reader_of
from looped.inference.generate import generate
from looped.inference.padding import Padding, Reading
from looped.models.build import unseeded
from looped.nn.checks import whole_number
from looped.nn.frequencies import Frequencies
from looped.nn.layers import TransformerLayer
from looped.nn.masks import Padded
from looped.objectives import Objective, build_objective
from looped.tensor_types import Int

KEPT = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"
"""The name of the cache in outputs, which changed in transformers 5.24."""
WAY: dict[str, bool] = {"use_reentrant": False, "preserve_rng_state": True}
"""The way layers are checkpointed, as arguments of torch.utils.checkpoint."""
CODE = "modeling_looped.py"
THIN = '''"""A model of the package `looped` (pip install looped), which computes it; see README.md in this folder."""

from looped.hub.wrapper import LoopedConfig, LoopedForCausalLM

__all__ = ["LoopedConfig", "LoopedForCausalLM"]
'''
"""The code in a model's folder, for `trust_remote_code=True`."""


class LoopedConfig(PretrainedConfig):
    """The config of an exported model. looped: the settings of its run; num_steps: loop or solver steps per token;
    vocab_size: rows of the embedding."""

    model_type = "looped"

    def __init__(self, looped: dict[str, Any] | None = None, num_steps: int = 1, vocab_size: int = 257, **kwargs: Any):
        self.looped = looped
        self.num_steps = num_steps
        self.vocab_size = vocab_size
        model = Config.model_validate(looped or {}).model
        self.hidden_size: int = model.width
        self.num_attention_heads: int = model.num_heads
        self.num_key_value_heads: int = model.kv_heads
        self.head_dim: int = model.head_width
        self.num_hidden_layers: int = model.num_prelude_layers + model.num_core_layers + model.num_coda_layers
        kwargs["auto_map"] = {"AutoConfig": f"{Path(CODE).stem}.LoopedConfig",
                              "AutoModelForCausalLM": f"{Path(CODE).stem}.LoopedForCausalLM"}
        kwargs["tie_word_embeddings"] = model.tie_embeddings
        super().__init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: `auto_map` is always set, and the model writes the file that it names."""

    @property
    def settings(self) -> Config:
        """The settings of the model's run."""
        return Config.model_validate(self.looped or {})

    @property
    def end_of_text(self) -> int | None:
        """The id of the run's own end-of-text token, the first of those at which `generate` stops."""
        ends = self.eos_token_id
        return ends[0] if isinstance(ends, list) else ends


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of this package behind the interface of transformers.

    Loops: all of `generate` except static caches. Denoisers: greedy search and sampling, with `num_steps` solver steps
    per token. A row's output depends only on its own tokens and the config's seed; text that is sampled depends on
    torch's own generator, as in transformers.
    """

    config_class: type[LoopedConfig] = LoopedConfig
    base_model_prefix = "objective"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]
    _supports_sdpa = True
    _tied_weights_keys = None

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        settings = config.settings
        # A tied head is the embedding itself: there is one tensor, and nothing to tie.
        self.objective: Objective = build_objective(
            settings, unseeded(settings, config.vocab_size), config.end_of_text)
        self.reader: Reader = reader_of(self.objective, settings)
        self.manner: Manner = PLAIN
        self.post_init()

    @classmethod
    def holding(cls, objective: Objective, config: LoopedConfig) -> "LoopedForCausalLM":
        """A model around an objective, whose weights it shares."""
        with torch.device("meta"):
            model = cls(config)
        model.objective, model.reader = objective, reader_of(objective, config.settings)
        return model

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Fill buffers that no file holds; `from_pretrained` refuses a file with missing weights."""
        if isinstance(module, Frequencies):
            module.reset_frequencies()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`. Raises UserError if the folder lacks a weight or has an unexpected one."""
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what, wrong in (("lacks", report["missing_keys"]), ("should not have", report["unexpected_keys"])):
            if wrong:
                raise UserError(f"the folder of this model {what} the tensor {sorted(wrong)[0]}; export it again")
        return (model, report) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: `save_pretrained` always writes the file that `auto_map` names."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, which also writes the file that `trust_remote_code=True` reads."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / CODE).write_text(THIN, encoding="utf-8", newline="")

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.reader.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.reader.model.embed = value

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.reader.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        self.reader.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> torch.nn.Embedding:
        """`PreTrainedModel.resize_token_embeddings`. Raises UserError for a denoiser."""
        self.reader.check_resizable()
        embed = super().resize_token_embeddings(*args, **kwargs)
        rows = self.reader.model.vocab_size = len(embed.weight)
        self.config.looped = self.config.settings.replace(**{"model.padded_vocab_size": rows}).model_dump(mode="json")
        return embed

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Int[Tensor, "batch new"] | None = None, attention_mask: Tensor | None = None,
                past_key_values: Any = None, labels: Tensor | None = None, use_cache: bool | None = None,
                num_steps: int | None = None, logits_to_keep: int = 0, cache: Any = None,
                return_dict: bool | None = None, position_ids: Tensor | None = None, inputs_embeds: None = None,
                output_attentions: bool | None = None, output_hidden_states: bool | None = None,
                ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, L, V) after `num_steps` steps, and the loss if `labels` are given (-100 is ignored); a tuple under
        return_dict=False.

        past_key_values (`cache` since transformers 5.24): the tokens read before, which the new ones follow.
        attention_mask: for cached and new tokens; padding on the left, or without a cache on the right. Other inputs
        of transformers, such as position_ids, must agree with these. Raises UserError for anything else.
        """
        kept = past_key_values if cache is None else cache
        if not isinstance(input_ids, Tensor) or inputs_embeds is not None:
            raise UserError("a looped model reads input_ids, not inputs_embeds; pass input_ids alone")
        if output_attentions or output_hidden_states:
            raise UserError("a looped model returns logits, no attentions and no hidden states; for its states by step "
                            "use model.objective.model.unroll(callback=)")
        first = 0 if kept is None else kept.get_seq_length()
        depth = self.config.num_steps if num_steps is None else num_steps
        whole_number("num_steps", depth, 1)
        logits_to_keep = whole_number("logits_to_keep", logits_to_keep)
        wanted = kept is not None or (use_cache if use_cache is not None else False)
        padding = _padding(attention_mask, input_ids, first, cached=wanted)
        reading = Reading(input_ids, int(depth), padding, first)
        _check_positions(position_ids, reading)
        if self.training and torch.is_grad_enabled() and kept is None:
            logits = self.reader.trained(reading)[:, -logits_to_keep:]
        elif wanted:
            kept = DynamicCache(config=self.config) if kept is None else kept
            logits, kept = KEEPING[type(self.reader)](self.reader, reading, kept, logits_to_keep, self.manner)
        else:
            logits = self.reader.logits(reading, logits_to_keep)
        loss = None if labels is None else self._loss(logits, labels)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{KEPT: kept})
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the labels. Raises UserError for labels of tokens without logits."""
        if labels.shape != logits.shape[:2]:
            raise UserError(f"labels have shape {tuple(labels.shape)}, but the logits {tuple(logits.shape[:2])}; give "
                            f"one label per token, leave logits_to_keep out, and read a denoiser with use_cache=False")
        return self.loss_function(logits, labels, vocab_size=self.config.vocab_size)

    # ---- generation --------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, which here also has `num_steps=`."""
        before = self.manner
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.manner = before

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError."""
        raise UserError("a looped model has no continuous batching, whose paged cache has a fixed number of layers; "
                        "leave cache_implementation='paged' and generate_batch out")

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The settings of `generate` as transformers merges them, which say how a denoiser writes, and the depth if
        they have one."""
        settings, rest = super()._prepare_generation_config(*args, **kwargs)
        if getattr(settings, "num_steps", None) is not None:
            rest.setdefault("num_steps", settings.num_steps)
        self.manner, settings = self.reader.manner_of(settings)
        return settings, rest

    def write(self, input_ids: Int[Tensor, "batch length"], num_tokens: int, num_steps: int | None = None,
              **how: Any) -> Int[Tensor, "batch {num_tokens}"]:
        """Continuations of prompts of one length by the sampler of `looped generate`; temperature, top_k, top_p, seed:
        as in `looped.generate`."""
        depth = self.config.num_steps if num_steps is None else num_steps
        return generate(self.objective, input_ids, num_tokens=num_tokens, depth=depth, **how)

    # ---- training ----------------------------------------------------------------------------------------------------

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None,
                                        every_n_layers: int = 1, offload: bool = False) -> None:
        """Each layer keeps only its inputs for the backward pass. Raises UserError for settings other than `WAY`."""
        if (activation_checkpointing_kwargs or {}).items() - WAY.items() or every_n_layers != 1 or offload:
            raise UserError(f"a looped model checkpoints every layer in one way, {WAY}; leave other settings of "
                            f"gradient checkpointing out")
        self._checkpoint(True)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None,
                                      **how: Any) -> None:
        """Older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **how)

    def activation_checkpointing_disable(self) -> None:
        """Layers keep all activations again."""
        self._checkpoint(False)

    gradient_checkpointing_disable = activation_checkpointing_disable

    def _checkpoint(self, on: bool) -> None:
        for layer in self._layers():
            layer.checkpointed = on

    def _layers(self) -> list[TransformerLayer]:
        return [module for module in self.modules() if isinstance(module, TransformerLayer)]

    @property
    def is_activation_checkpointing(self) -> bool:
        """True if layers keep only their inputs."""
        return any(layer.checkpointed for layer in self._layers())

    is_gradient_checkpointing = is_activation_checkpointing


def _check_positions(given: Tensor | None, reading: Reading) -> None:
    """Raises UserError for positions that do not follow from the mask, such as those of texts packed in one row."""
    if given is None:
        return
    places = reading.places().expand(reading.tokens.shape)
    if given.shape[-1] != places.shape[1] or bool(((given.expand(places.shape) != places) & (places >= 0)).any()):
        raise UserError("position_ids do not follow from the attention_mask, as if several texts were packed in one "
                        "row; give each text its own row")


def _padding(mask: Tensor | None, tokens: Tensor, first: int, *, cached: bool) -> Padding:
    """The padding that an attention mask describes. Raises UserError for right padding with a cache, and for holes."""
    width = first + tokens.shape[1]
    if mask is None:
        return Padding(None, width)
    if mask.shape != (len(tokens), width):
        raise UserError(f"attention_mask has shape {tuple(mask.shape)}, but there are {len(tokens)} texts of {width} "
                        f"tokens, cached ones included; give a mask of ones and zeros for all of them")
    if bool((mask == 1).all()):
        return Padding(None, width)
    padded = Padded.of_attention_mask(mask)
    if padded.side == "left":
        return Padding(padded.lengths.to(tokens.device), width)
    if cached:
        raise UserError("this batch is padded on the right, where new tokens follow; pad it on the left "
                        "(tokenizer.padding_side = 'left')")
    return Padding(None, width)  # causal rows never see what is on their right


AutoConfig.register(LoopedConfig.model_type, LoopedConfig)
AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM)
