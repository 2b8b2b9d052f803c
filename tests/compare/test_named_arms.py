"""An arm with a name of its own: the report calls it by that, and says once what it is."""

import json
import re
from dataclasses import replace

import pytest
from page_checks import check_alone

from looped.compare.comparison_kinds import TEXT
from looped.compare.compute_to_target import reaches
from looped.compare.plan import make_plan
from looped.compare.report import write_report
from looped.compare.text_summary import summarise_texts
from looped.config import load_config

SETTINGS = "optim.lr=0.5 model.injection=gated"


@pytest.fixture
def reported(made_up, tmp_path):
    """`reported("ar,denoise")`: (plan, what is said), of figures made up for these arms."""
    def report(objectives):
        plan = make_plan(load_config(None), objectives, budget=("tokens", 5), num_seeds=1, depths=[1], out=tmp_path)
        runs = [replace(made_up(place.config.objective, 0, [4.0]), place=place) for place in plan.places]
        return plan, write_report(plan, TEXT, runs)

    return report


def test_tables_rows_files_and_the_page_call_it_by_its_name_and_its_settings_stand_once(reported):
    plan, said = reported(f"ar,bold=denoise  {SETTINGS}")
    assert [plan.yaml(arm).name for arm in plan.arms] == ["ar.yaml", "bold.yaml"]
    assert [place.run.name for place in plan.places] == ["ar-0", "bold-0"]
    assert said.count(SETTINGS) == 1
    assert f"## The arms\n\n- bold: denoise {SETTINGS}\n\n" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("| ")] == ["arm", "ar", "bold"] * 3
    assert {json.loads(line)["arm"] for line in (plan.out / "compare.jsonl").read_text().splitlines()} == {"ar", "bold"}
    reader, _ = check_alone((plan.out / "report.html").read_text())
    assert reader.text.count(SETTINGS) == 1
    assert "ar and bold" in reader.text


def test_without_names_there_is_no_list_of_arms(reported):
    plan, said = reported(f"ar,denoise {SETTINGS}")
    assert f"| denoise {SETTINGS} |" in said
    assert "The arms" not in said + (plan.out / "report.html").read_text()


def test_the_file_holds_what_is_printed_in_the_same_order_and_pictures_that_are_there(reported):
    plan, said = reported("ar,denoise")
    text = (plan.out / "compare.md").read_text()
    parts = iter(text.removesuffix("\n").split("\n\n"))
    assert all(part in parts for part in said.split("\n\n"))  # uses up what stands before
    assert [part.split()[0] for part in said.split("\n\n")[2:5]] == ["-", "##", "|"]  # findings, then the table
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(links) == [f"plots/{name}.png" for name in ("depth", "gain", "layer-forwards", "seconds", "tokens")]
    assert all((plan.out / link).is_file() for link in links)
    for told in ("![", "\nlooped", "- versions: "):
        assert told in text
        assert told not in said


def test_truncated_is_what_others_are_to_reach_under_any_name(made_up):
    ar, loop, other = made_up("ar", 0, [4.0]), made_up("truncated", 0, [4.0]), made_up("denoise", 0, [4.0])
    named = replace(loop, place=replace(loop.place, arm=replace(loop.place.arm, name="loop")))
    assert ("denoise", "loop") in [(each.arm, each.to) for each in reaches(summarise_texts([ar, named, other]))]
