"""`looped merge`: combine the runs of single blocks into one run of the whole model.

The merged checkpoint holds each block's weights, EMA weights and optimiser state from its own run, and the shared parts
once. Nothing is computed; the merged run is written completely or not at all.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from looped.atomic_files import new_folder, write_text
from looped.config import Config, dump_config
from looped.data.image_batches import ImageSpec
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.training.block_runs import Part, check_fits, open_part, same_bits, shared_names, whole_config
from looped.training.checkpoint import (
    Tensors,
    check_same,
    module_tensors,
    part_of,
    save_checkpoint,
)
from looped.training.counters import Counters
from looped.training.data_identity import DATA
from looped.training.logs import METRICS, append, costs_of, read_metrics
from looped.training.runs import CONFIG, STAMP, TOKENIZER, stamp, started_in


def merge(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the run `out` of the whole model from one finished run per block, in any order.

    Raises UserError if a block is missing or given twice, if settings or data differ, if shared parts are not bitwise
    the same, if a run is unfinished or damaged, and if `out` exists.
    """
    with new_folder(out) as folder:
        parts = _in_order([open_part(Path(path)) for path in runs])
        config = whole_config(parts[0].config)
        _write(folder, config, parts, _assemble(config, parts))
    return Path(out)


def _in_order(parts: list[Part]) -> list[Part]:
    """The parts in the order of their blocks, after checking that each block is there once and that all fit together.
    """
    if not parts:
        raise UserError("merge needs the run of each block; see looped merge --help")
    first, by_block = parts[0], dict[int, Part]()
    for part in parts:
        if part.block in by_block:
            raise UserError(f"{by_block[part.block].path} and {part.path} are both runs of block {part.block}; give "
                            f"one run of each block")
        check_fits(part, first.config, first.state["data"], first.path)
        if part.vocabulary != first.vocabulary:
            raise UserError(f"{part.path} and {first.path} have different tokenizers for the same text; train "
                            f"both with the same version of tokenizers, or give both the same data.tokenizer")
        by_block[part.block] = part
    num = first.config.blocks.num
    missing = [str(block) for block in range(num) if block not in by_block]
    if missing:
        raise UserError(f"no run of block{'s' * (len(missing) > 1)} {', '.join(missing)} of {num} is given; train "
                        f"{'them' if len(missing) > 1 else 'it'} with looped train --block, and give the run of each")
    return [by_block[block] for block in range(num)]


def _assemble(config: Config, parts: list[Part]) -> dict[str, Tensors]:
    """The tensors of the merged checkpoint, by file."""
    state = parts[0].state
    picture = ImageSpec(**state["picture"]) if state.get("picture") else None
    objective = build_objective(config, build(config, state["vocab_size"], picture), state.get("end_of_text"))
    expected = module_tensors(objective)
    shared = _shared(config, parts, shared_names(objective, expected))
    files = {}
    for name in ("model", "ema") if parts[0].averages else ("model",):
        files[name] = dict(shared)
        for part in parts:
            found, own = part.tensors(name), objective.names_of(part.block)
            check_same({key: tensor for key, tensor in expected.items() if key in shared or key in own}, found,
                       part_of(part.checkpoint, name))
            files[name] |= {key: found[key] for key in own}
    return files | {"optimizer": _union(part.tensors("optimizer") for part in parts)}


def _shared(config: Config, parts: list[Part], names: list[str]) -> Tensors:
    """The shared parts, after checking that all blocks were trained with the same. Raises UserError otherwise."""
    source = parts[config.blocks.shared_by if config.blocks.shared == "with-block" else 0]
    for part in parts:
        for name in names:
            if name not in part.result or not same_bits(part.result[name], source.result[name]):
                way = ("train the others with it as blocks.shared_from" if config.blocks.shared == "with-block" else
                       "train all of them with the same version of looped and of torch")
                raise UserError(f"the shared part '{name}' of {part.path} differs from that of {source.path}; {way}")
    return {name: source.result[name] for name in names}


def _union(tensors: Iterable[Tensors]) -> Tensors:
    return {name: tensor for each in tensors for name, tensor in each.items()}


def _write(folder: Path, config: Config, parts: list[Part], tensors: dict[str, Tensors]) -> None:
    """Write the folder of the merged run, with the total cost of training."""
    first, spent = parts[0], asdict(_spent(parts))
    state = spent | {"vocab_size": first.state["vocab_size"], "picture": first.state.get("picture"),
                     "end_of_text": first.state.get("end_of_text"),
                     "data": first.state["data"], "meter": {},
                     "groups": [group for part in parts for group in part.state["groups"]]}
    # Relative paths in the config start from the folder where the first part was started.
    merged = {"merged": [str(part.path) for part in parts], "folder": str(started_in(first.path).absolute())}
    write_text(folder / STAMP, json.dumps(stamp(config, "cpu") | merged, indent=1))
    for name in (TOKENIZER, DATA):
        if (first.path / name).exists():
            write_text(folder / name, (first.path / name).read_text(encoding="utf-8"))
    append(folder / METRICS, json.dumps({"kind": "train", **spent, "peak_bytes": _peak(parts)}) + "\n")
    save_checkpoint(folder, spent["step"], tensors, state, keep=1)
    write_text(folder / CONFIG, dump_config(config))


def _spent(parts: list[Part]) -> Counters:
    """Total cost of the parts: steps of the longest run, sums of everything else."""
    each = [part.counters for part in parts]
    return Counters(max(c.step for c in each), sum(c.tokens for c in each), sum(c.layer_forwards for c in each),
                    sum(c.seconds for c in each))


def _peak(parts: list[Part]) -> float:
    return max(costs_of(read_metrics(part.path))["peak_bytes"] for part in parts)
