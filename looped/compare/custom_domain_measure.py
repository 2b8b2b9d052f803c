"""Comparison on a custom domain (domain.name): the fraction of its held-out examples answered correctly, by depth."""

from collections.abc import Sequence
from typing import Any

from looped.compare.accuracy_measure import ShareMeasured, ShareMeasurer, as_json
from looped.compare.accuracy_summary import ShareSummary
from looped.compare.accuracy_table import share_notes
from looped.compare.curve import Metric
from looped.compare.measure import Measurer
from looped.compare.plan import Plan, RunSpec
from looped.compare.table_cells import over_seeds
from looped.config import Config
from looped.domains import domain_of
from looped.errors import UserError
from looped.evaluation.metric_rows import keep_nothing
from looped.evaluation.options import Options


class OwnMeasurer(ShareMeasurer):
    """Evaluates each run with its domain; the result must have a field `right`."""

    def evaluate(self, place: RunSpec) -> dict[str, Any]:
        run = self.load(place)
        domain = domain_of(run.config)
        found = domain.evaluate(run.objective, run.data, run.config, self.depths(place), Options(), keep=keep_nothing)
        right = getattr(found, "right", None)
        if right is None:
            raise UserError(f"domain.name {run.config.domain.name} does not report which examples are right; give the "
                            f"result of its evaluate a field `right`: depth -> a tensor of 0 and 1")
        return as_json(found.rows, {None: right})


def own_measurer(config: Config) -> type[Measurer]:
    """The measurer for the custom domain of a config."""
    metric, examples = config.kind.metric, domain_of(config).examples
    gauge = Metric(metric, metric, "", metric, higher_is_better=True, worst=0.0, examples=examples, is_share=True)
    measured = type("OwnMeasured", (ShareMeasured,), {"gauge": gauge})
    return type("OwnMeasurer", (OwnMeasurer,), {"measured": measured})


def own_notes(arms: Sequence[ShareSummary], plan: Plan) -> list[str]:
    """Notes that explain the columns."""
    gauge, config = arms[0].runs[0].gauge, plan.config
    return [f"{gauge.name}: the fraction of held-out {gauge.examples} ({config.kind.source(config)}) that are right "
            f"(higher is better), {over_seeds(plan)}. The number in brackets is the depth.",
            *share_notes(arms, plan, one="example", group=f"held-out {gauge.examples}",
                         followed=f"all held-out {gauge.examples}")]
