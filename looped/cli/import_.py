"""`looped import`: convert a pretrained model into a run."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb


@dataclass
class Import(Verb):
    """Convert a pretrained model, dense or looped, into a run. The model is a folder with config.json and safetensors,
    or a name on the Hugging Face hub, NAME or NAME@REVISION. None of its code is run.

    Dense: Llama, Mistral, Qwen2, Qwen3, OLMo2, SmolLM2, SmolLM3. Looped: Huginn, Retrofit, Ouro, STARS, Nanbeige4.2.
    The run is at step 0: evaluate it, sample from it, train it further with `looped train RUN/config.yaml`, or start
    other runs from it with --training.warm_start RUN.
    """

    source: Positional[str]
    """the model's folder, or its name on the hub"""
    out: Path
    """the folder of the run, which must not exist"""
    layers: str | None = None
    """prelude/core/coda, to cut a loop out of a dense stack: 4/8/4 keeps the first 4 layers, the last 4, and the 8
    right before these, which are looped; if not given, all layers form one block that runs once"""
    tokenizer: Path | None = None
    """a tokenizer.json, or a folder with one, if the model has none"""

    def __call__(self, settings: Settings) -> None:
        from looped.hub.importing import import_model

        made = import_model(self.source, self.out, layers=self.layers, tokenizer=self.tokenizer, settings=settings)
        m = made.config.model
        print(f"{made.path}: {made.family}, {made.parameters:,} parameters, layers "
              f"{m.num_prelude_layers}/{m.num_core_layers}/{m.num_coda_layers}; try\n"
              f"  looped generate {made.path} --prompt \"Once upon a time\"\n"
              f"  looped eval {made.path} --text FILE")
