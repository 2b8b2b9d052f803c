"""9x9 Sudoku by singles and guesses: uniqueness, and the number of guesses undone, which rates a puzzle.

The state of a search is one integer of 729 bits: bit `81 * digit + cell` (digit from 0) is set if the cell can still
take the digit. Two rules are applied as long as they find anything, to all digits and units at once:

    naked single    a cell has one digit left
    hidden single   a digit has one cell left in a row, column or box

Where they find nothing, a cell with the fewest digits left is chosen, at random among several, and its digits are
guessed in turn. Sudoku-Extreme is rated in the same way, by the backtracks of the solver tdoku (dataset card of
sapientinc/sudoku-extreme), which knows more rules and therefore guesses less often.
"""

from collections.abc import Iterator, Sequence
from random import Random

CELLS, DIGITS = 81, range(9)
EVERY_CELL = (1 << CELLS) - 1
EVERY = (1 << 9 * CELLS) - 1


def _spread(cells: int) -> int:
    """A mask of cells, for every digit."""
    return sum(cells << CELLS * digit for digit in DIGITS)


EVERY_DIGIT = _spread(1)
"""The first cell for every digit; times a mask of cells, these cells for every digit."""
ROWS = _spread(sum(1 << 9 * row for row in DIGITS))
COLUMNS = _spread((1 << 9) - 1)
BLOCKS = _spread(sum(1 << 27 * band + 3 * stack for band in range(3) for stack in range(3)))
"""The first cell of every row, column and box, for every digit."""
PLACES = (
    (ROWS, tuple(range(9)), (1 << 9) - 1),
    (COLUMNS, tuple(range(0, 81, 9)), sum(1 << 9 * row for row in DIGITS)),
    (BLOCKS, tuple(9 * row + column for row in range(3) for column in range(3)),
     sum(1 << 9 * row + column for row in range(3) for column in range(3))),
)
"""(first cells, distances of a unit's cells from its first, mask of a unit that begins at cell 0)."""


def _kept(bit: int) -> int:
    """The candidates left once a digit is in a cell: no other digit there, nor the digit in a unit of the cell."""
    digit, cell = divmod(bit, CELLS)
    row, column = divmod(cell, 9)
    shut = sum(1 << CELLS * digit + 9 * r + c for r in DIGITS for c in DIGITS
               if r == row or c == column or (r // 3, c // 3) == (row // 3, column // 3))
    return EVERY & ~(shut | _spread(1 << cell)) | 1 << bit


KEPT: tuple[int, ...] = tuple(map(_kept, range(9 * CELLS)))


def settle(state: int, settled: int) -> tuple[int, int, int]:
    """Apply both rules until they find nothing. (state, mask of the bits settled, mask of the cells with two digits).

    A state without solution that the rules notice comes back as 0. settled: bits whose consequences are in `state`.
    """
    while True:
        ones = twos = threes = 0
        for shift in range(0, 9 * CELLS, CELLS):
            digit = state >> shift & EVERY_CELL
            threes |= twos & digit
            twos |= ones & digit
            ones |= digit
        if ones != EVERY_CELL:
            return 0, settled, 0
        found = (ones & ~twos) * EVERY_DIGIT & state & ~settled
        if not found:
            for first, distances, unit in PLACES:
                some = several = 0
                for distance in distances:
                    place = state >> distance & first
                    several |= some & place
                    some |= place
                if some != first:
                    return 0, settled, 0
                found |= (some & ~several) * unit & state
            found &= ~settled
            if not found:
                return state, settled, twos & ~threes
        settled |= found
        while found:
            bit = found & -found
            found ^= bit
            if not state & bit:
                return 0, settled, 0
            state &= KEPT[bit.bit_length() - 1]


def possible(givens: Sequence[int]) -> tuple[int, int]:
    """(state, bits settled) of a puzzle of 81 digits, 0: empty."""
    state, settled = EVERY, 0
    for cell, digit in enumerate(givens):
        if digit:
            bit = CELLS * (digit - 1) + cell
            state &= KEPT[bit]
            settled |= 1 << bit
    return state, settled


def filled(solution: Sequence[int]) -> int:
    """The state in which every cell has its digit of a solution."""
    return sum(1 << CELLS * (digit - 1) + cell for cell, digit in enumerate(solution))


def _branch(state: int, settled: int, pairs: int, rng: Random) -> list[int]:
    """The bits of the cell to guess: one with the fewest digits left, at random among several."""
    if pairs:
        cells = pairs
    else:
        counts = [(state >> cell & EVERY_DIGIT).bit_count() for cell in range(CELLS)]
        fewest = min(count for count in counts if count > 1)
        cells = sum(1 << cell for cell, count in enumerate(counts) if count == fewest)
    for _ in range(rng.randrange(cells.bit_count())):
        cells &= cells - 1
    cell = (cells & -cells).bit_length() - 1
    return [bit for bit in range(cell, 9 * CELLS, CELLS) if state >> bit & 1]


def solutions(state: int, settled: int, rng: Random) -> Iterator[int]:
    """The solutions of a state, as states with one digit in every cell."""
    state, settled, pairs = settle(state, settled)
    if state.bit_count() == CELLS:
        yield state
    elif state:
        for bit in _branch(state, settled, pairs, rng):
            yield from solutions(state & KEPT[bit], settled | 1 << bit, rng)


def other_solution(givens: Sequence[int], right: int, rng: Random) -> int | None:
    """A solution of a puzzle besides `right` (a state); None if there is no other."""
    return next((found for found in solutions(*possible(givens), rng) if found != right), None)


def _dead_guesses(state: int, settled: int, rng: Random) -> int:
    """The number of guesses until a state without solution is found out, the one that led to it included."""
    state, settled, pairs = settle(state, settled)
    if not state:
        return 1
    return 1 + sum(_dead_guesses(state & KEPT[bit], settled | 1 << bit, rng)
                   for bit in _branch(state, settled, pairs, rng))


def backtracks(givens: Sequence[int], solution: Sequence[int], rng: Random) -> float:
    """The number of guesses undone before a puzzle with one solution is solved, expected over the order of digits.

    The cells to guess are drawn with `rng`. At a cell on the way to the solution each wrong digit comes before the
    right one in half of the orders, and what follows from it is then searched to the end in any order; so the
    expectation is half of all guesses that are wrong.
    """
    state, settled = possible(givens)
    right = filled(solution)
    undone = 0
    while True:
        state, settled, pairs = settle(state, settled)
        if state.bit_count() == CELLS:
            return undone / 2
        for bit in _branch(state, settled, pairs, rng):
            if right >> bit & 1:
                chosen = bit
            else:
                undone += _dead_guesses(state & KEPT[bit], settled | 1 << bit, rng)
        state, settled = state & KEPT[chosen], settled | 1 << chosen


def rating(givens: Sequence[int], solution: Sequence[int], rng: Random, orders: int) -> float:
    """The mean of `backtracks` over several choices of the cells to guess."""
    return sum(backtracks(givens, solution, rng) for _ in range(orders)) / orders
