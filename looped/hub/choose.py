"""The models that `looped eval` sets beside a run: twins are runs of this toolkit; judges and encoders are runs where
their name is a run's folder, else models of the hub."""

from pathlib import Path

from looped.errors import UserError
from looped.evaluation.judge import Judge, Reader
from looped.evaluation.mauve import Encoder, RunEncoder
from looped.training.runs import CONFIG, Run, load_run


def open_judge(name: str, writer: Run) -> Reader:
    """The judge of `writer`'s samples. Raises `UserError`, also for a run of another tokenizer than the writer's."""
    if not is_run(name):
        from looped.hub.judge import HubJudge

        return HubJudge(name, writer.tokenizer.decode, end_of_text=writer.tokenizer.end_of_text)
    run = load_run(name)
    judge = Judge(name, run.objective, run.config.main_depth, run.tokenizer.json())
    judge.check(str(writer.path), writer.tokenizer.json())
    return judge


def open_twin(path: Path, writer: Run) -> Run:
    """A run whose likelihood or samples are held beside `writer`'s. Raises `UserError` for another tokenizer."""
    twin = load_run(path)
    if twin.tokenizer.json() != writer.tokenizer.json():
        raise UserError(f"twin {path} has another tokenizer than {writer.path}; train it on the same text")
    return twin


def open_encoder(name: str) -> Encoder:
    """The encoder that MAUVE takes its features from. Raises `UserError`."""
    if not is_run(name):
        from looped.hub.encoder import HubEncoder

        return HubEncoder(name)
    run = load_run(name)
    return RunEncoder(name, run.objective, run.config.main_depth, run.tokenizer.encode)


def is_run(name: str) -> bool:
    """Whether a name is the folder of a run."""
    return (Path(name) / CONFIG).is_file()
