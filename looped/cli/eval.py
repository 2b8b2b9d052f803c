"""`looped eval`: evaluate a trained run at every depth."""

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
from looped.config.unread_settings import notice
from looped.errors import UserError, flag_of

if TYPE_CHECKING:
    from looped.domains.base import About, Domain, Options
    from looped.evaluation.result_files import EvaluationFiles
    from looped.training.runs import Run


ALONE = ("trajectories", "probes", "twin", "judge", "match", "mauve", "text", "per_token")
"""Flags that evaluate held-out text and cannot be combined with --tasks."""


@dataclass
class Eval(Verb):
    """Evaluate a trained run at every depth: on held-out text, with generated samples, on held-out problems or images,
    or on tasks of lm-evaluation-harness.

    Prints a table, adds to eval/depth.jsonl, examples.jsonl, sequences.jsonl and samples.jsonl in the run's folder, and
    draws plots/*.png. Results on other data than the run's own go to its subfolder other/ (docs/figures.md;
    looped.read_results). Ctrl-C keeps finished results, and another evaluation adds its depths. Settings evaluation.*
    and those of the solver (--denoise.solver, .schedule, .bridge, .start) may be changed; the field `settings`
    distinguishes their rows.
    """

    run: Positional[Path]
    """the folder of a run"""
    depths: str | None = None
    """loop steps, solver steps of a denoiser, or unmasking steps, e.g. 1,4,16; if not given, evaluation.depths"""
    trajectories: int = 0
    """also measure a denoiser's configured solver itself, by the mean readout of this many trajectories"""
    probes: bool = False
    """also check for failures that a loss can hide: copying, an ignored context, quality that falls with depth"""
    twin: Path | None = None
    """the baseline, a run of --objective ar trained on the same text; the probes also report the gap to it"""
    judge: str | None = None
    """the model that scores the samples: a run (another seed, the same text) or a causal model on the Hugging Face
    hub"""
    match: Path | None = None
    """with --judge: a run whose samples are compared with these at equal diversity"""
    mauve: str | None = None
    """also MAUVE, with features of this encoder: a run, or a model on the Hugging Face hub"""
    difficulties: str | None = None
    """tasks: difficulties to measure, e.g. 16,32,64; if not given, evaluation.difficulties, or the task's own"""
    exits: str | None = None
    """also measure early exit, per problem of a task or per token of text: kl, entropy, latent, answer, confidence,
    head or gate, with a threshold as in kl=1e-4; comma-separated"""
    features: Path | None = None
    """image generation: a classifier run on the same images, whose features define the distances; if not given, pixels
    """
    per_token: bool = False
    """also write eval/tokens.parquet: the loss of each held-out token at each depth, and with --exits its exit step"""
    text: str | None = None
    """evaluate on this text instead of the run's held-out text: a file, a folder or a glob of text, JSON lines or
    parquet, encoded with the run's tokenizer; bits/byte are comparable between tokenizers"""
    puzzles: str | None = None
    """tasks: evaluate on the held-out puzzles of this file instead of the run's own: a CSV such as Sudoku-Extreme's, or
    a folder with train.csv and test.csv"""
    text_field: str | None = None
    """with --text: the field that holds the text in JSON lines and parquet; if not given, data.text_field"""
    tasks: str | None = None
    """evaluate on tasks of lm-evaluation-harness instead of held-out text: names of tasks or paths of YAML files, e.g.
    hellaswag,mine.yaml; writes eval/tasks.jsonl and report.html (pip install 'looped[harness]')"""
    limit: int | None = None
    """with --tasks: use only this many documents of each task, the first ones"""
    num_fewshot: int | None = None
    """with --tasks: few-shot examples before each question; if not given, as the task defines"""
    max_length: int | None = None
    """with --tasks: token limit of a question with its answer; longer ones are truncated on the left; if not given,
    data.length, or the limit of an imported model"""
    other_data: bool = False
    """accept that the text, task or images of the run's config, or of the runs it is compared with, differ from those
    it was trained on"""
    device: str = "auto"
    """auto (the best available of cuda, mps, cpu), cpu, cuda, cuda:1 or mps"""
    dtype: str = "fp32"
    """fp32, or bf16 or fp16 under autocast, which are faster on a GPU but round products, so compare only results of
    the same format"""
    out: Path | None = None
    """folder for the evaluation's files; if not given, the run's own"""
    step: int | None = None
    """evaluate this checkpoint instead of the newest one"""
    raw: bool = False
    """use the last weights instead of the EMA weights (optim.ema_decay)"""
    json: bool = False
    """print the rows as JSON lines instead of the table"""

    def __call__(self, settings: Settings) -> None:
        depths = parse_depths(self.depths) if self.depths is not None else None
        if self.trajectories < 0:
            raise UserError(f"--trajectories {self.trajectories} is negative; use 0 to leave it out")
        if self.match is not None and self.judge is None:
            raise UserError("--match needs a judge that scores both sets of samples; add --judge")
        if self.text_field is not None and self.text is None:
            raise UserError(f"--text-field {self.text_field} applies only to --text; add --text")
        self._check_tasks()
        from looped.data.eval_text import read_heldout
        from looped.data.task_data import puzzles_of_file
        from looped.devices import Placement
        from looped.domains import domain_of
        from looped.domains.base import OPTIONS
        from looped.training.runs import load_run

        place = Placement.of(self.device, self.dtype)
        run = load_run(self.run, ema=not self.raw, step=self.step, settings=settings, device=place.device,
                       other_data=self.other_data)
        notice(run.config, settings)
        domain, whole = domain_of(run.config), run.config.blocks.alone is None
        given = [name for name in OPTIONS if getattr(self, name)]
        domain.check(run.config, [name for name in given if whole or name in ("text", "puzzles")], self.run)
        if self.text is not None:
            run.data = read_heldout(self.text, run.tokenizer, run.config.data, field=self.text_field)
        if self.puzzles is not None:
            run.data = puzzles_of_file(run.config.task, self.puzzles)
        with place.at_work(run.config.training.threads):
            if whole and self.tasks is not None:
                self._ask_tasks(run, place, depths or run.config.evaluation.depths)
            elif whole:
                self._measure(run, place, domain, depths or run.config.evaluation.depths, settings)
            else:
                self._of_block(run, place, domain.unit)

    def _check_tasks(self) -> None:
        """Raises UserError for flags that cannot be combined with --tasks, or that need it."""
        for flag in ("limit", "num_fewshot", "max_length"):
            value, least = getattr(self, flag), int(flag != "num_fewshot")
            name = flag_of(flag)
            if value is not None and self.tasks is None:
                raise UserError(f"{name} {value} applies only to --tasks; add --tasks")
            if value is not None and value < least:
                raise UserError(f"{name} {value} is below {least}; give {least} or more, or leave it out")
        for flag in ALONE:
            if self.tasks is not None and getattr(self, flag):
                raise UserError(f"{flag_of(flag)} evaluates held-out text, which --tasks replaces; run looped eval "
                                f"once with each")

    def _options(self, run, settings: Settings) -> "Options":
        """The options of this command, with the models they name loaded. Raises UserError."""
        from looped.evaluation.options import Options
        from looped.evaluation.sample_quality import Reference
        from looped.hub.eval_models import open_encoder, open_features, open_judge, open_twin
        from looped.inference.exits import Exit

        def reference(flag: str, path: Path | None) -> Reference | None:
            if path is None:
                return None
            other = open_twin(path, run, flag)
            return Reference(str(other.path), other.objective, other.config.main_depth)

        return Options(
            trajectories=self.trajectories, probes=self.probes,
            twin=reference("twin", self.twin), match=reference("match", self.match),
            judge=open_judge(self.judge, run) if self.judge is not None else None,
            mauve=open_encoder(self.mauve, run.device) if self.mauve is not None else None,
            difficulties=self._difficulties(run, settings),
            exits=[Exit.parse(part) for part in self.exits.split(",")] if self.exits is not None else [],
            features=open_features(self.features, run) if self.features is not None else None,
            per_token=self.per_token)

    def _difficulties(self, run, settings: Settings) -> list[int] | None:
        """The difficulties to measure; None: those of the config. Other puzzles have their own."""
        if self.difficulties is not None:
            return parse_levels(self.difficulties)
        own = self.puzzles is not None and "evaluation.difficulties" not in settings
        return list(run.data.task.tested) if own else None

    def _measure(self, run, place, domain: "Domain", depths: list[int], settings: Settings) -> None:
        """Evaluate the whole model and print the table."""
        from looped.evaluation.result_files import SEQUENCES
        from looped.reports.markdown import markdown

        options = self._options(run, settings)
        with self._files(run, place) as files:
            files.add({SEQUENCES: domain.sequences(run.data, run.config, options)})
            found = domain.evaluate(run.objective, run.data, run.config, depths, options, keep=files.keep)
            where = found.leave(files, run.config, _told_of(run, place))
        if self.json:
            files.show(found.rows)
            return
        print(f"{run.path}: {run.config.objective} on {run.data.facts['source']} after {run.step} steps, "
              f"measured on {place.name}\n")
        print(f"{markdown(found.sections(run.path.name))}\n\n{where}")

    def _ask_tasks(self, run, place, depths: list[int]) -> None:
        """Evaluate the tasks of --tasks at each depth and print the report."""
        from looped.evaluation.result_files import TASK_EXAMPLES, TASKS
        from looped.hub.harness_tasks import Benchmarks
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
        print(f"{run.path}: {run.config.objective} after {run.step} steps, measured on {place.name}\n")
        print(f"{markdown(found)}\n\nreport in {files.folder / 'report.html'}, rows in {files.folder / TASKS}")

    @contextmanager
    def _files(self, run, place, name: str | None = None) -> Iterator["EvaluationFiles"]:
        """The files of the evaluation, checked to be writable. Ctrl-C inside the context prints the contents of the
        file `name`, or of the rows if None."""
        from looped.evaluation.result_files import ROWS, EvaluationFiles, changed_settings
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
        """Evaluate the loss of a run that holds one block, which needs no other block."""
        for flag in ("depths", "trajectories", "probes", "twin", "judge", "match", "mauve", "difficulties", "exits",
                     "features", "tasks", "per_token"):
            if getattr(self, flag):
                need_whole(run, f"supports {flag_of(flag)}")
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
                  f"held-out loss of this block: {loss:.4f}{unit}\n"
                  f"(evaluation by depth needs all blocks; see looped merge)")


def need_whole(run: "Run", does: str) -> None:
    """Raises UserError if the run holds only one block; `does`: clause about the whole model, for the message."""
    if run.config.blocks.alone is not None:
        raise UserError(f"{run.path} holds only block {run.config.blocks.alone}, and only the whole model {does}; "
                        f"merge the runs of all blocks with looped merge")


def _folder(run) -> Path:
    """The folder of the results: the run's own, or for other data a subfolder named after them, so that they never mix.
    """
    if run.measured_on is None:
        return run.path
    return run.path / "other" / re.sub(r"[^A-Za-z0-9.]+", "-", run.measured_on.rpartition("/")[2]).strip("-")


def _about(run, place) -> dict[str, Any]:
    """Fields with the device and the data of an evaluation, added to all its rows."""
    data = {} if run.measured_on is None else {"data": run.measured_on}
    return {**place.fields, **data}


def _told_of(run, place) -> "About":
    """The facts shown at the top of a report."""
    from looped.domains.base import About
    from looped.training.runs import read_stamp

    return About(run.path.name, run.step, asdict(run.spent), read_stamp(run.path), place.name)
