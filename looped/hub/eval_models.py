"""Loads the other models that `looped eval` needs: the baseline, the judge of samples and the text encoder.

A baseline is a run of this toolkit; a judge or an encoder is a run if its name is a run's folder, else a model of the
Hugging Face hub.
"""

from pathlib import Path

import torch

from looped.errors import UserError
from looped.evaluation.image_features import Features, classifier_features, pixel_features
from looped.evaluation.judge import Judge, Reader
from looped.evaluation.mauve import Encoder, RunEncoder
from looped.training.runs import CONFIG, Run, load_run


def open_judge(name: str, writer: Run) -> Reader:
    """The judge of `writer`'s samples. Raises `UserError`, also for a run with another tokenizer."""
    if not is_run(name):
        from looped.hub.judge import HubJudge

        return HubJudge(name, writer.tokenizer.decode, end_of_text=writer.tokenizer.end_of_text, device=writer.device)
    run = load_run(name, device=writer.device)
    judge = Judge(name, run.objective, run.config.main_depth, run.tokenizer.json())
    judge.check(str(writer.path), writer.tokenizer.json())
    _check_data("judge", run, writer)
    return judge


def open_twin(path: Path, writer: Run, flag: str = "twin") -> Run:
    """The run that `flag` names, to compare its likelihood or samples with `writer`'s. Raises `UserError` for another
    tokenizer, and for other data without --other-data."""
    twin = load_run(path, device=writer.device)
    if twin.tokenizer.json() != writer.tokenizer.json():
        raise UserError(f"--{flag} {path} has another tokenizer than {writer.path}; train it on the same text")
    _check_data(flag, twin, writer)
    return twin


def open_features(path: Path | None, maker: Run) -> Features:
    """The features that the images of `maker` are compared in: pixels, or those of a classifier run. Raises `UserError`
    for a run that is no classifier, and for one on other images without --other-data."""
    if path is None:
        return pixel_features()
    run = load_run(path, device=maker.device, other_data=maker.other_data)
    _check_data("features", run, maker)
    return classifier_features(str(path), run.objective, run.config, picture=maker.data.picture,
                               scale=run.scale if run.identity.picture else None)


def _check_data(flag: str, other: Run, run: Run) -> None:
    """Raises `UserError` if `other` was trained on other data than `run`, without --other-data: training data of one
    must not be held-out data of the other."""
    change = None if run.other_data else run.identity.change_of_contents(other.identity)
    if change is not None:
        raise UserError(f"--{flag} {other.path} was trained on other data than {run.path} ({change}); choose a run on "
                        f"the same data, or allow other data with --other-data")


def open_encoder(name: str, device: torch.device) -> Encoder:
    """The text encoder for MAUVE. Raises `UserError`."""
    if not is_run(name):
        from looped.hub.encoder import HubEncoder

        return HubEncoder(name, device=device)
    run = load_run(name, device=device)
    return RunEncoder(name, run.objective, run.config.main_depth, run.tokenizer.encode)


def is_run(name: str) -> bool:
    """True if a name is the folder of a run."""
    return (Path(name) / CONFIG).is_file()
