"""Parity, copy, addition, p-hop and word problems: right by oracles of another kind, the same on every call."""

import hashlib
from itertools import accumulate, pairwise

import numpy as np
import pytest
from sympy.combinatorics import AlternatingGroup, SymmetricGroup

from looped.data.task import BLANK, find_task, next_token
from looped.errors import UserError
from looped.tasks.addition import add
from looped.tasks.induction import follow

GOLDEN = {  # of the first problem at the hardest tested difficulty: a change of the stream changes every result
    "prefix-sums": "6c3a45fd03c20ad2", "parity": "3e93782497adf6de", "copy": "b2bc4b08f7163240",
    "addition": "e7606a606de8955f", "nary-addition": "33f48a30842e00de", "p-hop": "282b3b495b608077",
    "s5": "573424fe621255f4", "a5": "5c4831c5bcf32a17",
}
VARIANTS = [
    *((name, {}) for name in GOLDEN), ("copy", {"alphabet": 2}), ("addition", {"reverse": False}),
    ("copy", {"columns": True}), ("addition", {"columns": True}),
    ("nary-addition", {"columns": True, "reverse": False, "digits": 4}),
    ("nary-addition", {"reverse": False, "digits": 1}), ("p-hop", {"alphabet": 3, "length": 100}),
    ("p-hop", {"every": True}),
]


def problems(task, count=20):
    """(difficulty, problem): some of every difficulty that is trained or tested."""
    first, last = task.trained
    for difficulty in {*range(first, last + 1), *task.tested}:
        for index in range(count):
            yield difficulty, task.problem(3, index, difficulty, heldout=difficulty > last)


def texts(task, problem):
    """(question, answer) as text."""
    question = "".join(task.symbols[token] for token in problem.targets[~problem.scored])
    return question, "".join(task.symbols[token] for token in problem.targets[problem.scored])


# ---- right answers, by other means -----------------------------------------------------------------------------------


def test_prefix_sums_are_the_parities_of_the_ones_so_far():
    task = find_task("prefix-sums")
    for bits, problem in problems(task):
        given = task.show(problem.inputs)
        assert given[0] == "^"
        assert len(given) == 1 + bits == 1 + problem.scored[1:].sum()
        assert not problem.scored[0]
        parities = (str(given[:end].count("1") % 2) for end in range(2, bits + 2))
        assert task.show(problem.targets) == "^" + "".join(parities)


def test_parity_is_that_of_the_number_of_ones():
    task = find_task("parity")
    for bits, problem in problems(task):
        question, answer = texts(task, problem)
        assert len(question) == bits + 1
        assert question[-1] == "="
        assert answer == str(int(question[:-1], 2).bit_count() % 2)


@pytest.mark.parametrize("alphabet", [2, 10, 26])
def test_a_copy_repeats_its_question(alphabet):
    task = find_task("copy", {"alphabet": alphabet})
    seen = set()
    for letters, problem in problems(task):
        question, answer = texts(task, problem)
        assert question == answer + "|"
        assert len(answer) == letters
        seen |= set(answer)
    assert seen == set("abcdefghijklmnopqrstuvwxyz"[:alphabet])


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("name", ["addition", "nary-addition"])
def test_sums_are_those_of_python_integers(name, reverse):
    task = find_task(name, {"reverse": reverse})
    for difficulty, problem in problems(task):
        question, answer = texts(task, problem)
        numbers = question.removesuffix("=").split("+")
        assert (len(numbers), {*map(len, numbers)}) == ((2, {difficulty}) if name == "addition" else (difficulty, {3}))
        assert len(answer) == (difficulty + 1 if name == "addition" else len(str(999 * difficulty)))
        order = -1 if reverse else 1
        assert sum(int(number[::order]) for number in numbers) == int(answer[::order])


def test_a_carry_runs_through_the_whole_sum():
    nines, one = [9] * 30, [1] + [0] * 29
    assert add(np.array([nines, one]), 31).tolist() == [0] * 30 + [1]
    assert add(np.full((1000, 3), 9), 6).tolist() == [0, 0, 0, 9, 9, 9]  # 1000 x 999 = 999000


def hop(row, hops, start=None):
    """The paper's definition, places counted from 1 and 0 for "nowhere": the letter that `hops` hops from place `start`
    (the last) lead to, or None."""
    v = " " + row

    def find(i, p):
        i = i if p == 1 else find(i, p - 1)
        return max({0} | {j for j in range(2, i + 1) if v[j - 1] == v[i]})

    place = find(start or len(row), hops)
    return v[place] if place else None


@pytest.mark.parametrize("options", [
    {}, {"alphabet": 3, "length": 30}, {"length": 256}, {"alphabet": 26, "length": 416},
])
def test_p_hop_agrees_with_the_paper_and_its_chain_never_ends_early(options):
    task = find_task("p-hop", options)
    answers = set()
    for hops, problem in problems(task, count=10):
        question, answer = texts(task, problem)
        marks, row = question[:hops], question[hops:]
        assert marks == ">" * hops
        assert len(row) == task.length
        assert all(a != b for a, b in pairwise(row))
        assert answer == hop(row, hops)
        answers.add(answer)
    assert answers <= set(task.symbols[2:])
    assert len(answers) >= 3


def test_p_hop_asked_at_every_letter_agrees_with_the_paper_at_each():
    task = find_task("p-hop", {"every": True, "length": 40})
    assert task.symbols[-1] == "-"
    for hops, problem in problems(task, count=3):
        question, answer = texts(task, problem)
        row = question.removeprefix(">" * hops)
        assert answer == "".join(hop(row, hops, place) or "-" for place in range(1, 41))
        assert answer[0] == "-" != answer[-1]


def test_hops_done_by_hand():
    row = "bacbcab"  # b at 7: the b before is at 4, and c follows; that c: the one before is at 3, b follows; then a
    letters = np.array(["abc".index(letter) for letter in row])
    assert [follow(letters, hops)[-1] for hops in (1, 2, 3, 4)] == [4, 3, 1, len(row)]
    assert [hop(row, hops) for hops in (1, 2, 3, 4)] == ["c", "b", "a", None]


def test_rows_of_p_hop_are_not_those_of_few_hops():
    """Positive control for the oracle: one hop less leads elsewhere in most problems."""
    task = find_task("p-hop")
    other = [hop(question[8:], 7) != answer for question, answer in
             (texts(task, task.problem(0, index, 8)) for index in range(50))]
    assert np.mean(other) == 1  # no two neighbours are equal, so neither are the ends of two hops in a row


@pytest.mark.parametrize(("name", "group"), [("s5", SymmetricGroup(5)), ("a5", AlternatingGroup(5))])
def test_running_products_are_those_of_sympy(name, group):
    task = find_task(name)
    symbol = {"".join(map(str, element.array_form)): element for element in group.elements}
    assert set(task.symbols[1:-1]) == set(symbol)
    for factors, problem in problems(task, count=2):
        assert task.symbols[problem.inputs[0]] == "^"
        assert problem.scored.tolist() == [False] + [True] * factors
        word = [symbol[task.symbols[token]] for token in problem.inputs[1:]]
        products = list(accumulate(word, lambda left, right: left * right))  # sympy applies the left one first
        assert [symbol[task.symbols[token]] for token in problem.targets[1:]] == products


@pytest.mark.parametrize(("name", "order"), [("s5", 120), ("a5", 60)])
def test_the_tables_are_groups(name, order):
    table = find_task(name).table
    assert table.shape == (order, order)
    every = np.arange(order)
    assert (np.sort(table, axis=0) == every[:, None]).all()  # closed, and every element has its inverses
    assert (np.sort(table, axis=1) == every).all()
    assert (table[0] == every).all()  # token 1 is the identity
    assert (table[:, 0] == every).all()
    assert (table[table] == table[:, table]).all()  # (ab)c = a(bc)
    assert (table != table.T).any()


@pytest.mark.parametrize(("name", "moved", "num"), [("s5", 2, 1 + 10), ("s5", 3, 1 + 10 + 20), ("a5", 3, 1 + 20),
                                                    ("s5", 5, 120), ("a5", 4, 1 + 20 + 15), ("a5", 5, 60)])
def test_factors_move_as_few_things_as_asked_and_still_reach_the_whole_group(name, moved, num):
    task = find_task(name, {"moved": moved})
    assert len(task.factors) == num
    assert all(sum(a != b for a, b in zip(task.symbols[1 + factor], "01234", strict=True)) <= moved
               for factor in task.factors)
    reached = {0}
    while more := {int(task.table[element, factor]) for element in reached for factor in task.factors} - reached:
        reached |= more
    assert len(reached) == len(task.table)
    drawn = {token for index in range(100) for token in task.problem(0, index, 16).inputs[1:]}
    assert drawn <= set(1 + task.factors)


@pytest.mark.parametrize(("name", "moved"), [("s5", 1), ("s5", 6), ("a5", 2), ("a5", "two")])
def test_factors_that_cannot_move_so_many_are_refused(name, moved):
    with pytest.raises(UserError, match=r"task.options.moved .* take one of"):
        find_task(name, {"moved": moved})


def test_a5_is_the_subgroup_of_s5():
    s5, a5 = find_task("s5"), find_task("a5")
    into = s5.tokens(a5.symbols[1:-1]) - 1
    assert (s5.table[np.ix_(into, into)] == into[a5.table]).all()


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("name", ["addition", "nary-addition"])
def test_columns_hold_digits_of_one_significance(name, reverse):
    task = find_task(name, {"reverse": reverse, "columns": True})
    for _, problem in problems(task, count=2):
        cells = dict(zip(map(tuple, task.coordinates(len(problem)).tolist()), problem.targets - 1, strict=True))
        assert len(cells) == len(problem)
        rows = max(row for row, _ in cells)
        numbers = [sum(10**place * digit for (row, place), digit in cells.items() if row == at and digit < 10)
                   for at in range(rows + 1)]
        assert sum(numbers[:-1]) == numbers[-1]


def test_columns_hold_a_letter_and_its_copy():
    task = find_task("copy", {"columns": True})
    for letters, problem in problems(task, count=2):
        cells = dict(zip(map(tuple, task.coordinates(len(problem)).tolist()), problem.targets, strict=True))
        assert [cells[0, place] for place in range(letters)] == [cells[1, place] for place in range(letters)]
        assert task.symbols[cells[0, letters]] == "|"


def test_columns_hold_a_letter_and_what_is_asked_of_it():
    task = find_task("p-hop", {"every": True})
    rows, places = task.coordinates(3 + 2 * 64).T
    assert rows.tolist() == [0] * 67 + [1] * 64
    assert places.tolist() == [*range(-3, 64), *range(64)]


# ---- what holds of every task ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_what_is_not_sought_is_known(name, options):
    task = find_task(name, options)
    assert task.symbols[BLANK] == "."
    assert len(set(task.symbols)) == len(task.symbols)
    for _, problem in problems(task, count=3):
        for row in (problem.inputs, problem.targets):
            assert row.dtype == np.int64
            assert row.min() >= 0
            assert row.max() < len(task.symbols)
        assert (problem.targets != BLANK).all()
        assert (problem.inputs == problem.targets)[~problem.scored].all()
        assert problem.scored.any()
        if task.causal == "next-token":
            assert (problem.inputs[problem.scored] == BLANK).all()
            assert (np.diff(problem.scored.astype(int)) >= 0).all()  # the question is before the answer
            assert next_token(problem).scored.sum() == problem.scored.sum()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_right_answer_is_right_and_any_one_wrong_cell_is_wrong(name, options):
    task = find_task(name, options)
    for _, problem in problems(task, count=1):
        assert task.is_right(problem, problem.targets)
        for cell in range(len(problem)):
            answer = problem.targets.copy()
            answer[cell] = 1 + answer[cell] % (len(task.symbols) - 1)
            assert task.is_right(problem, answer) == (not problem.scored[cell])


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_problems_are_a_function_of_seed_index_difficulty_and_purpose(name, options):
    hardest = max(find_task(name, options).tested)

    def key(seed=0, index=0, difficulty=hardest, heldout=False):
        problem = find_task(name, options).problem(seed, index, difficulty, heldout=heldout)
        return problem.inputs.tobytes() + problem.targets.tobytes()

    assert key() == key()
    others = [key(seed=1), key(index=1), key(difficulty=hardest - 1), key(heldout=True)]
    assert len({key(), *others}) == 5


@pytest.mark.parametrize("name", GOLDEN)
def test_no_problem_measured_was_trained_on(name):
    task = find_task(name)
    trained, measured = ({task.problem(0, index, max(task.tested), heldout=heldout).inputs.tobytes()
                          for index in range(200)} for heldout in (False, True))
    assert len(trained) == len(measured) == 200
    assert not trained & measured


@pytest.mark.parametrize("name", GOLDEN)
def test_harder_problems_than_any_trained_are_longer(name):
    task = find_task(name)
    last = task.trained[1]
    assert task.tested[0] == last  # the first level measured is the edge of training, the others lie beyond
    assert task.tested == tuple(sorted(set(task.tested)))
    lengths = [len(task.problem(0, 0, difficulty)) for difficulty in task.tested]
    assert lengths == sorted(set(lengths))
    with pytest.raises(UserError, match="begins at difficulty"):
        task.problem(0, 0, task.easiest - 1)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_stream_of_problems_has_not_changed(name):
    task = find_task(name)
    problem = task.problem(0, 0, max(task.tested))
    rows = np.stack([problem.inputs, problem.targets]).astype("<i8").tobytes()
    assert hashlib.sha256(rows).hexdigest()[:16] == GOLDEN[name]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "why"), [
    ("copy", {"alphabet": 1}, "task.options.alphabet 1 is not .* 2 to 26"),
    ("copy", {"alphabet": "ab"}, "task.options.alphabet 'ab'"),
    ("copy", {"columns": 1}, "task.options.columns 1 is neither true .* nor false"),
    ("addition", {"reverse": "no"}, "task.options.reverse 'no' is neither true .* nor false"),
    ("nary-addition", {"reverse": 1}, "task.options.reverse 1"),
    ("nary-addition", {"digits": 0}, "task.options.digits 0 .* 1 or more"),
    ("p-hop", {"alphabet": 2}, "task.options.alphabet 2 is not .* 3 to 26"),
    ("p-hop", {"length": 15}, "task.options.length 15 is too short for 4 hops among 4 letters; make it 16 or more"),
    ("p-hop", {"length": None}, "task.options.length None"),
    ("p-hop", {"every": 1}, "task.options.every 1 is neither true .an answer for each letter. nor false"),
    ("parity", {"alphabet": 2}, "no option 'alphabet'"),
])
def test_a_bad_option_is_named_with_its_value_and_the_way_out(name, options, why):
    with pytest.raises(UserError, match=why) as error:
        find_task(name, options)
    assert "\n" not in str(error.value)


def test_more_hops_than_the_row_has_room_for_are_refused():
    assert find_task("p-hop").tested == (4, 8, 16)
    assert find_task("p-hop", {"length": 256}).tested == (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="length 64 is too short for 17 hops among 4 letters; make it 68 or"):
        find_task("p-hop").problem(0, 0, 17)
