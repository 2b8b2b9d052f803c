"""The model card of an exported run: facts about the model and its training, how to load it, its depth curve."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped.errors import UserError
from looped.evaluation.metric_rows import Row, row_of
from looped.evaluation.result_files import read_rows
from looped.inference.rollout import rollout_of
from looped.reports.markdown import markdown
from looped.reports.sections import Facts, Heading, Prose, Section, Table, Verbatim
from looped.training.runs import Run, read_stamp

LOOPED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)  # needs: pip install 'looped[hub]'
tokenizer = AutoTokenizer.from_pretrained(DIR)
ids = model.generate(**tokenizer("Once", return_tensors="pt"), num_steps={num_steps}, max_new_tokens=50)
print(tokenizer.decode(ids[0]))"""
PLAIN = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(DIR)"""
STEPS = {"solver": "steps of the solver"}
"""Rollout -> unit of depth, if it is not a step of the loop."""


@dataclass(frozen=True)
class Card:
    """A model card. form: the layout of the model's folder, such as `llama`; num_steps: the default depth; alone: the
    model loads without this package."""

    run: Run
    form: str
    num_steps: int
    licence: str | None = None
    alone: bool = False

    def text(self, folder: Path) -> str:
        """The README.md of a folder."""
        front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- looped-transformer",
                 "- recurrent-depth", *([f"license: {self.licence}"] if self.licence else [])]
        return "---\n" + "\n".join(front) + "\n---\n\n" + markdown(self._sections(), folder) + "\n"

    def _sections(self) -> list[Section]:
        unit = STEPS.get(rollout_of(self.run.objective).name, "steps of the loop")
        depth = (f"Its depth is fixed: {self.num_steps} {unit}, unrolled into layers." if self.alone else
                 f"`num_steps` is the number of {unit} per token, by default {self.num_steps}; any number works. After "
                 f"`import looped.hub.wrapper`, `trust_remote_code` is not needed.")
        code = PLAIN if self.alone else LOOPED.format(num_steps=self.num_steps)
        return [Heading(self.run.path.resolve().name, 1),
                Prose("A looped language model: a block of layers is applied repeatedly, so the depth is chosen at "
                      "inference."),
                Facts(self._facts()), Heading("Use"), Verbatim(code), Prose(depth), *_curve(self.run)]

    def _facts(self) -> dict[str, str]:
        run, model, stamp = self.run, self.run.config.model, read_stamp(self.run.path)
        imported = stamp.get("imported")
        versions = stamp.get("versions", {})
        return {
            "form": self.form, "licence": self.licence or "not stated",
            "made": f"from {imported['source']}" if imported else "by training from random weights",
            "rule": run.config.objective,
            "parameters": f"{sum(weight.numel() for weight in run.objective.parameters()):,}",
            "layers": f"{model.num_prelude_layers} before the loop, {model.num_core_layers} in it"
                      + (f" (run {model.layer_runs} times per step)" if model.layer_runs > 1 else "") + ", "
                                            f"{model.num_coda_layers} after it; width {model.width}",
            "data": run.identity.facts.get("source", "none in this run"),
            "training": f"{run.step:,} steps, {run.spent.tokens:,} tokens, {run.spent.seconds:,.0f} s; seed "
                        f"{run.config.seed}",
            "command": f"`{shlex.join(['looped', *stamp.get('argv', [''])[1:]])}`",
            "versions": ", ".join(f"{name} {versions[name]}" for name in ("looped", "torch") if versions.get(name))}


def _curve(run: Run) -> list[Section]:
    """The depth curve that `looped eval` measured, if there is one."""
    try:
        lines = read_rows(run.path)
    except UserError:
        return []
    rows = [row_of(line) for line in lines if _is_own(line, run)]
    if not rows:
        return []
    return [Heading("Depth"), Prose("Held-out nats/token over depth, with 95 % intervals."), _table(rows)]


def _is_own(line: dict[str, Any], run: Run) -> bool:
    return (line.get("step") == run.step and line["metric"] == "nats_per_token" and not line.get("settings")
            and not line.get("data") and line.get("depth") is not None)


def _table(rows: Sequence[Row]) -> Table:
    by_depth = {row.depth: row for row in rows}
    cells = [[str(depth), f"{row.mean:.4f}", "" if row.ci_low is None else f"{row.ci_low:.4f} to {row.ci_high:.4f}",
              "" if row.layer_forwards is None else f"{row.layer_forwards:g}"]
             for depth, row in sorted(by_depth.items())]
    return Table(("depth", "nats/token", "95 % interval", "layer forwards"), cells)
