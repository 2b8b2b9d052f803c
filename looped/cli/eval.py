"""`looped eval`: a trained run measured at every depth, on text or on problems; what is heavy is imported in place."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, parse_depths, parse_levels
from looped.config import load_config
from looped.config.reads import notice
from looped.errors import UserError

if TYPE_CHECKING:
    from looped.domains.base import About, Domain, Options
    from looped.evaluation.store import EvaluationFiles
    from looped.training.runs import Run


ALONE = ("trajectories", "probes", "twin", "judge", "match", "mauve", "text")
"""Flags that measure held-out text, of which --tasks knows nothing."""


@dataclass
class Eval(Verb):
    """Measure a trained run at every depth: on held-out text, with samples of its own, on held-out problems, or on the
    tasks of lm-evaluation-harness.

    Prints a table; adds to eval/depth.jsonl, eval/examples.jsonl, eval/samples.jsonl in the run's folder, and draws
    plots/*.png; of other data than it was trained on, below its other/. Ctrl-C keeps what is finished, and another
    evaluation adds its depths. Settings of evaluation.* and the solver (--denoise.solver, .schedule, .bridge, .start)
    may be changed; their rows are kept apart by `settings`.
    """

    run: Positional[Path]
    """the folder of a run"""
    depths: str | None = None
    """loop steps, solver steps of a denoiser, or unmasking steps, as 1,4,16; those of evaluation.depths if not given"""
    trajectories: int = 0
    """also measure a denoiser's configured solver as it is, by the mean readout of this many runs"""
    probes: bool = False
    """also look for what a loss can hide: copying, an ignored context, a curve that falls"""
    twin: Path | None = None
    """a run of --objective ar trained on the same text: the probes also say how far behind it this one is"""
    judge: str | None = None
    """who reads the samples: a run (another seed, the same text), or a causal model of the Hugging Face hub"""
    match: Path | None = None
    """with --judge, a run whose samples these are held against at equal diversity"""
    mauve: str | None = None
    """also MAUVE, with the features of this encoder: a run, or a model of the Hugging Face hub"""
    difficulties: str | None = None
    """of a task: the levels to measure, as 16,32,64; those of evaluation.difficulties, or the task's own, if not given
    """
    exits: str | None = None
    """also stop each problem of a task, or each token of text, early: by kl, entropy, latent, answer, confidence, head
    or gate, with thresholds as in kl=1e-4; several with commas"""
    features: Path | None = None
    """of a run that makes images: the run of a classifier of the same images, in whose features distances are measured;
    pixels if not given"""
    text: str | None = None
    """measure the run on this text instead of its own held-out one: a file, a folder or a glob of text, JSON lines or
    parquet, read with the tokenizer of the run; bits/byte compare between runs of different tokenizers"""
    text_field: str | None = None
    """with --text, the field that holds the text in JSON lines and parquet; data.text_field if not given"""
    tasks: str | None = None
    """measure tasks of lm-evaluation-harness instead of held-out text: names that it knows, or paths of YAML files, as
    hellaswag,mine.yaml; leaves eval/tasks.jsonl and report.html (pip install 'looped[harness]')"""
    limit: int | None = None
    """with --tasks, so many first documents of each alone"""
    num_fewshot: int | None = None
    """with --tasks, worked examples before each question; those of the task if not given"""
    max_length: int | None = None
    """with --tasks, the tokens that a question may have with its answer: a longer one loses its beginning; data.length
    if not given, or what an imported model says"""
    other_data: bool = False
    """the text, task or images that the run's config leads to, and the runs beside it, may be others than those that it
    was trained on"""
    device: str = "auto"
    """auto (the best there is: cuda, mps, cpu), cpu, cuda, cuda:1 or mps"""
    dtype: str = "fp32"
    """fp32, or bf16 or fp16 under autocast: faster on a GPU, with rounded products, so that figures compare only among
    themselves"""
    out: Path | None = None
    """the folder that gets the evaluation's files; the run's own if not given"""
    step: int | None = None
    """evaluate this checkpoint instead of the newest one"""
    raw: bool = False
    """the last weights instead of the averaged ones (optim.ema_decay)"""
    json: bool = False
    """print the rows as JSON lines instead of the table"""

    def __call__(self, settings: Settings) -> None:
        depths = parse_depths(self.depths) if self.depths is not None else None
        if self.trajectories < 0:
            raise UserError(f"--trajectories {self.trajectories} is negative; 0 leaves the solver out")
        if self.match is not None and self.judge is None:
            raise UserError("--match needs somebody who reads both; add --judge")
        if self.text_field is not None and self.text is None:
            raise UserError(f"--text-field {self.text_field} is of the files of --text; add it")
        self._check_tasks()
        from looped.data.heldout import read_heldout
        from looped.devices import Placement
        from looped.domains import domain_of
        from looped.domains.base import OPTIONS
        from looped.training.runs import load_run

        place = Placement.of(self.device, self.dtype)
        run = load_run(self.run, ema=not self.raw, step=self.step, settings=settings, device=place.device,
                       other_data=self.other_data)
        notice(run.config, settings)
        domain, whole = domain_of(run.config), run.config.blocks.alone is None
        domain.check(run.config, [name for name in OPTIONS if getattr(self, name) and (whole or name == "text")],
                     self.run)
        if self.text is not None:
            run.data = read_heldout(self.text, run.tokenizer, run.config.data, field=self.text_field)
        with place.at_work(run.config.training.threads):
            if whole and self.tasks is not None:
                self._ask_tasks(run, place, depths or run.config.evaluation.depths)
            elif whole:
                self._measure(run, place, domain, depths or run.config.evaluation.depths)
            else:
                self._of_block(run, place, domain.unit)

    def _check_tasks(self) -> None:
        """Raises UserError for flags that do not go together with --tasks, or mean nothing without."""
        for flag in ("limit", "num_fewshot", "max_length"):
            value, least = getattr(self, flag), int(flag != "num_fewshot")
            name = f"--{flag.replace('_', '-')}"
            if value is not None and self.tasks is None:
                raise UserError(f"{name} {value} is of the tasks of --tasks; add it")
            if value is not None and value < least:
                raise UserError(f"{name} {value} is below {least}; give {least} or more, or leave it out")
        for flag in ALONE:
            if self.tasks is not None and getattr(self, flag):
                raise UserError(f"--{flag} measures held-out text, and --tasks asks questions instead; run looped eval "
                                f"once with each")

    def _options(self, run) -> "Options":
        """The options of this command, with the models that they name opened. Raises UserError."""
        from looped.evaluation.options import Options
        from looped.evaluation.quality import Twin
        from looped.hub.choose import open_encoder, open_features, open_judge, open_twin
        from looped.inference.exits import Exit

        twin, other = (open_twin(path, run, flag) if path is not None else None
                       for flag, path in (("twin", self.twin), ("match", self.match)))
        return Options(
            trajectories=self.trajectories, probes=self.probes, twin=twin and twin.objective,
            match=Twin(str(other.path), other.objective, other.config.main_depth) if other is not None else None,
            judge=open_judge(self.judge, run) if self.judge is not None else None,
            mauve=open_encoder(self.mauve, run.device) if self.mauve is not None else None,
            difficulties=parse_levels(self.difficulties) if self.difficulties is not None else None,
            exits=[Exit.parse(part) for part in self.exits.split(",")] if self.exits is not None else [],
            features=open_features(self.features, run) if self.features is not None else None)

    def _measure(self, run, place, domain: "Domain", depths: list[int]) -> None:
        """All of the run's blocks together."""
        from looped.reports.markdown import markdown

        options = self._options(run)
        with self._files(run, place) as files:
            found = domain.evaluate(run.objective, run.data, run.config, depths, options, keep=files.keep)
            where = found.leave(files, run.config, _told_of(run, place))
        if self.json:
            files.show(found.rows)
            return
        print(f"{run.path}: {run.config.objective} on {run.data.facts['source']} after {run.step} steps, "
              f"measured on {place.name}\n")
        print(f"{markdown(found.sections(run.path.name))}\n\n{where}")

    def _ask_tasks(self, run, place, depths: list[int]) -> None:
        """All tasks, at one depth after another."""
        from looped.evaluation.store import TASK_EXAMPLES, TASKS
        from looped.hub.benchmarks import Benchmarks
        from looped.reports.benchmarks import leave_report
        from looped.reports.markdown import markdown

        asked = Benchmarks(self.tasks, run, depths, limit=self.limit, num_fewshot=self.num_fewshot,
                           max_length=self.max_length)
        rows = []
        with self._files(run, place, TASKS) as files:
            for part in asked.measure():
                files.add({TASKS: [row.as_dict() for row in part.rows], TASK_EXAMPLES: part.examples})
                rows += part.rows
            found = leave_report(files, run.config, _told_of(run, place), asked.facts)
        if self.json:
            files.show(rows)
            return
        print(f"{run.path}: {run.config.objective} after {run.step} steps, asked on {place.name}\n")
        print(f"{markdown(found)}\n\nreport in {files.folder / 'report.html'}, rows in {files.folder / TASKS}")

    @contextmanager
    def _files(self, run, place, name: str | None = None) -> Iterator["EvaluationFiles"]:
        """The files of the evaluation, which can be written; Ctrl-C inside says what that of a name holds, that of the
        rows if None."""
        from looped.evaluation.store import ROWS, EvaluationFiles, changed_settings
        from looped.training.runs import CONFIG, changed_since_start

        flags = {"weights": "last" if self.raw and run.config.optim.ema_decay else None,
                 "dtype": place.dtype if place.dtype != "fp32" else None, "max_length": self.max_length}
        changed = changed_settings(load_config(run.path / CONFIG), run.config, flags,
                                   since=changed_since_start(run.path, run.step))
        about = _about(run, place) | ({} if self.out is None else {"run": str(run.path)})
        files = EvaluationFiles(self.out or _folder(run), run.step, changed, about=about)
        files.check(run.config)
        try:
            yield files
        except KeyboardInterrupt:
            print(f"\ninterrupted; {files.contents(name or ROWS)}", file=sys.stderr)
            raise

    def _of_block(self, run, place, unit: str) -> None:
        """One block alone: its own loss, which asks no other."""
        for flag in ("depths", "trajectories", "probes", "twin", "judge", "match", "mauve", "difficulties", "exits",
                     "features", "tasks"):
            if getattr(self, flag):
                need_whole(run, f"does --{flag}")
        import torch

        from looped.training.heldout import heldout_own

        with torch.no_grad():
            loss = heldout_own(run.objective, run.data, run.config)["loss"]
        if self.json:
            print(json.dumps({"block": run.config.blocks.alone, "step": run.step, **_about(run, place),
                              "loss": loss}))
        else:
            print(f"{run.path}: block {run.config.blocks.alone} alone after {run.step} steps, measured on "
                  f"{place.name}\n\n"
                  f"its own loss on held-out data: {loss:.4f}{unit}\n"
                  f"(depth needs the other blocks as well: looped merge)")


def need_whole(run: "Run", does: str) -> None:
    """Raises UserError for a run of one block alone, where something asks all of them."""
    if run.config.blocks.alone is not None:
        raise UserError(f"{run.path} holds block {run.config.blocks.alone} alone, and only the whole model {does}; put "
                        f"the runs of all blocks together with looped merge")


def _folder(run) -> Path:
    """The folder of the figures: the run's own, or one of the data that are not its own, so that the two never mix."""
    if run.measured_on is None:
        return run.path
    return run.path / "other" / re.sub(r"[^A-Za-z0-9.]+", "-", run.measured_on.rpartition("/")[2]).strip("-")


def _about(run, place) -> dict[str, Any]:
    """The device and the data that all figures of an evaluation were measured on."""
    data = {} if run.measured_on is None else {"data": run.measured_on}
    return {**place.fields, **data}


def _told_of(run, place) -> "About":
    """The facts at the head of a report."""
    from looped.domains.base import About
    from looped.training.runs import read_stamp

    return About(run.path.name, run.step, asdict(run.spent), read_stamp(run.path), place.name)
