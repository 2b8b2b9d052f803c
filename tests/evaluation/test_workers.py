"""Batches that are divided among processes come back in their order, on every process."""

import pytest

from looped.evaluation.workers import ALONE, SeveralWorkers, placed


def divided(num, batches, measure):
    """(what every process gets, what each has measured), of `num` processes one after another."""
    done = []
    for rank in range(num):
        done.append([])
        SeveralWorkers(rank, num, lambda work: [done[-1].extend(work())] and [[]] * num).over(batches, measure)
    return [SeveralWorkers(rank, num, lambda work: done).over(batches, measure) for rank in range(num)], done


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 4, 7])
def test_every_process_has_the_results_of_all_batches_in_order(num, size):
    found, done = divided(num, range(size), lambda batch: 10 * batch)
    assert found == [ALONE.over(range(size), lambda batch: 10 * batch)] * num
    assert sum(map(len, done)) == size
    assert max(map(len, done)) - min(map(len, done)) <= 1


def test_batches_are_smaller_only_where_a_process_would_have_none():
    assert ALONE.batch_size(16, 10) == 16
    sizes = {num: SeveralWorkers(0, num, lambda work: []).batch_size(16, 64) for num in (2, 4, 5, 100)}
    assert sizes == {2: 16, 4: 16, 5: 13, 100: 1}


def test_batches_are_placed_by_their_rows():
    assert list(placed(["abc", "de", "f"])) == [(0, "abc"), (3, "de"), (5, "f")]
