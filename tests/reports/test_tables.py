"""The table of a depth sweep holds what was measured and no empty column; what needs words is said below it."""

from looped.reports.markdown import markdown
from looped.reports.runs import depth_table


def row(metric, mean, depth=None, **fields):
    return {"metric": metric, "mean": mean, "ci_low": mean - 1, "ci_high": mean + 1, "n": 8, **fields} | (
        {"depth": depth} if depth is not None else {})


LIKELIHOOD = [row("nats_per_token", 3.0, 1), row("nats_per_token", 2.5, 4)]
JUDGED = [row("judged_nats_of_text", 3.1, by="runs/judge"), row("judged_nats", 3.4, 1, by="runs/judge")]
MATCHED = [row("twin_judged_nats", 3.3, 1, by="runs/judge"), row("twin_distinct_2", 0.8, 1, by="runs/twin"),
           row("matched_perplexity_percent", 2.0, 1, temperature=0.9, by="runs/twin"),
           row("unmatched_distinct_2", 0.6, 4, temperature=2.0, by="runs/twin")]


def table_of(rows):
    """As it is printed."""
    return markdown(depth_table({"a": rows}))


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_columns_without_a_figure_are_left_out():
    header, _, *lines = cells(table_of(LIKELIHOOD))
    assert header == ["run", "depth", "nats/token"]
    assert lines == [["a", "1", "3.000 [2.000, 4.000]"], ["a", "4", "2.500 [1.500, 3.500]"]]
    header, _, first, second = cells(table_of([*LIKELIHOOD, *JUDGED]))
    assert header[-1] == "judged"
    assert (first[-1], second[-1]) == ("3.400", "-")


def test_what_could_not_be_matched_is_said():
    text = table_of([*LIKELIHOOD, *JUDGED, *MATCHED])
    _, _, first, second = cells(text)
    assert (first[-1], second[-1]) == ("+2.0 % [1.0, 3.0] at 0.90", "out of reach")
    assert "out of reach: at depth 4 the closest distinct-2 of a is 0.600, at temperature 2.00" in text


def test_what_two_judges_say_stands_in_lines_of_their_own():
    other = [row("judged_nats", 5.6, 4, by="runs/other"), row("judged_nats_of_text", 5.1, by="runs/other")]
    text = table_of([*LIKELIHOOD, *JUDGED, *other])
    header, _, *lines = cells(text)
    found = {(line[0], line[header.index("depth")]): line[header.index("judged")] for line in lines}
    assert found == {("a, runs/judge", "1"): "3.400", ("a, runs/other", "4"): "5.600"}
    assert "under runs/judge" in text
    assert "under runs/other" in text


def test_a_depth_of_the_twin_alone_is_no_line_of_the_run():
    twin = [row("twin_judged_nats", 3.3, 9, by="runs/judge"), row("twin_distinct_2", 0.8, 9, by="runs/twin")]
    assert len(cells(table_of([*LIKELIHOOD, *twin]))) == 4


def test_few_samples_are_said_to_be_few_and_mauve_is_never_without_its_encoder():
    few, many = (table_of([*LIKELIHOOD, row("mauve", 0.9, 1, by="gpt2-large") | {"n": n}]) for n in (8, 5000))
    assert "gpt2-large" in few
    assert "gpt2-large" in many
    assert "too few" in few
    assert "too few" not in many
