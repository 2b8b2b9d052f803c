"""A dataset that is streamed and never stored: each document once per epoch, and exactly on from any place."""

import json
import threading

import pytest
import torch
from byte_tokenizer import byte_level

from looped.config import load_config
from looped.config.data import DataConfig
from looped.data.endless import find_endless
from looped.data.from_config import find_data
from looped.data.tokenizer import load_tokenizer
from looped.errors import UserError

datasets = pytest.importorskip("datasets")
BATCH = {"batch_size": 8, "length": 16, "seed": 0}


@pytest.fixture(params=[2, 3], ids=["shards divide", "shards do not divide"])
def shards(request):
    return request.param


@pytest.fixture
def make(tmp_path, monkeypatch, shards):
    """The DataConfig of a stream of 120 short documents; keywords change it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "rows").mkdir()
    for shard in range(shards):
        rows = [{"text": "" if row == 7 else f"shard {shard}, row {row}: " + "naïve 🙂 fox " * (row % 5), "n": row}
                for row in range(120 // shards)]
        (tmp_path / "rows" / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_level(["<|endoftext|>"]).save(str(tmp_path / "t.json"))
    return lambda **settings: DataConfig(**{"dataset": str(tmp_path / "rows"), "streaming": "endless", "length": 16,
                                            "tokenizer": str(tmp_path / "t.json"), "heldout_bytes": 300, **settings})


def stream_of(data, rank=0, num=1, places=None):
    train = find_endless(data).open().train
    train.go_to(places, rank, num)
    return train


def rows_of(rank, num):
    return range(rank * 8 // num, (rank + 1) * 8 // num)


def documents_of(windows, tokenizer):
    """The texts that the windows, which overlap by a token, are cut from."""
    tokens = torch.cat([windows[0][:1], *(window[1:] for window in windows)]).tolist()
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.end_of_text]
    return [tokenizer.decode(tokens[start:stop]) for start, stop in zip([0, *(end + 1 for end in ends)], ends,
                                                                        strict=False)]


@pytest.mark.parametrize("num", [1, 2])
def test_all_processes_together_see_each_document_but_the_held_out_ones_once_per_epoch(make, num):
    text, tokenizer = find_endless(make()).open(), load_tokenizer(make().tokenizer)
    rows = list(datasets.load_dataset(make().dataset, split="train", streaming=True))
    filled = [row["text"] for row in rows if row["text"]]
    expected = filled[len(text.heldout.documents) :]  # all are different
    assert len(set(filled)) == len(filled) > len(expected) > 90
    seen = []
    for rank in range(num):
        train = stream_of(make(), rank, num)
        windows = [window for step in range(400) for window in train.batch(step, rows=rows_of(rank, num), **BATCH)]
        mine = documents_of(windows, tokenizer)
        once = mine[: mine.index(mine[0], 1)]
        assert mine[: 2 * len(once)] == once * 2  # epoch after epoch, in order
        seen += once
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("stop", [0, 1, 10, 150])
def test_a_stream_goes_on_exactly_from_a_place_that_went_through_json(make, num, stop):
    places, wholes = [], []
    for rank in range(num):
        whole, stopped = stream_of(make(), rank, num), stream_of(make(), rank, num)
        wholes.append([whole.batch(step, rows=rows_of(rank, num), **BATCH) for step in range(stop + 160)])
        for step in range(stop):
            assert torch.equal(stopped.batch(step, rows=rows_of(rank, num), **BATCH), wholes[rank][step])
        stopped.batch(stop, rows=rows_of(rank, num)[:2], **BATCH)  # drawn ahead, and not used
        places.append(stopped.place(stop))
    assert wholes[0][-1].shape == (8 // num, 17)
    places = json.loads(json.dumps(places))
    assert not num > 1 or not torch.equal(wholes[0][0], wholes[1][0])
    for rank in range(num):
        again = stream_of(make(), rank, num, places)
        for step in range(stop, stop + 160):
            assert torch.equal(again.batch(step, rows=rows_of(rank, num), **BATCH), wholes[rank][step])


def test_a_place_is_small_however_long_its_document(make, tmp_path):
    (tmp_path / "rows" / "0.jsonl").write_text(json.dumps({"text": "held out " * 50}) + "\n"
                                               + json.dumps({"text": "a long text " * 20_000}) + "\n")
    train = stream_of(make())
    train.batch(0, **BATCH)
    place = train.place(1)
    assert place["offset"] == 8 * 16
    assert len(json.dumps(place)) < 1000


def test_a_batch_can_be_asked_for_again_and_its_rows_are_named(make):
    train = stream_of(make())
    first, second = train.batch(0, **BATCH), train.batch(1, **BATCH)
    assert torch.equal(train.batch(0, **BATCH), first)
    assert torch.equal(train.batch(1, rows=range(3, 5), **BATCH), second[3:5])
    (line,) = train.describe(1, rows=range(3, 4), **BATCH)
    assert line.startswith("row 3: train#")
    assert "of rank 0, epoch 0" in line


def test_a_place_is_that_of_the_step_however_far_a_thread_has_drawn(make):
    train, plain = stream_of(make()), stream_of(make())
    expected = []
    for step in range(30):
        expected.append(plain.place(step))
        plain.batch(step, **BATCH)
    thread = threading.Thread(target=lambda: [train.batch(step, **BATCH) for step in range(20)])
    thread.start()
    thread.join()
    assert [train.place(step) for step in (19, 20)] == expected[19:21]


def test_another_number_of_processes_is_refused_with_the_way_out(make):
    place = stream_of(make()).place(0)
    with pytest.raises(UserError, match=r"has the places of 2 processes in the stream of dataset .*, and their "
                                        r"number now is 3; start 2 processes, or choose another --run"):
        stream_of(make(), 0, 3, [place, place])


def test_the_first_documents_are_held_out_and_identify_the_stream(make, tmp_path):
    found = find_endless(make())
    texts = [row["text"] for row in datasets.load_dataset(make().dataset, split="train", streaming=True)]
    filled = [text for text in texts if text]
    num = next(num for num in range(1, 99) if sum(len(text.encode()) for text in filled[:num]) >= 300)
    assert [document.text for document in found.heldout] == filled[:num]
    text = found.open()
    assert text.bytes_per_token == sum(len(text.encode()) for text in filled[:num]) / len(text.heldout)
    assert text.facts.items() >= found.facts.items()
    assert f"streamed: {len(text.heldout):,} held-out tokens ({num} documents)" in text.summary
    assert find_endless(make()).fingerprint == found.fingerprint
    assert find_endless(make(heldout_bytes=400)).fingerprint != found.fingerprint
    config = load_config(None, {"evaluation.prompt_length": 8} | {f"data.{name}": value for name, value in
                                                                 make().model_dump().items()})
    assert find_data(config).fingerprint == found.fingerprint
    assert find_data(config).prepare().startswith("nothing to prepare")


def test_a_stream_that_is_held_out_altogether_is_refused(make):
    with pytest.raises(UserError, match=r"ends after 5,7\d\d bytes, and data.heldout_bytes 9,999,999 holds them"):
        find_endless(make(heldout_bytes=9_999_999))


def test_a_stream_of_nothing_but_copies_of_the_held_out_text_is_refused(make, tmp_path, shards):
    for shard in range(shards):
        (tmp_path / "rows" / f"{shard}.jsonl").write_text((json.dumps({"text": "the same " * 40}) + "\n") * 20)
    with pytest.raises(UserError, match=r"has no text for rank 0 of 1 but the held-out documents"):
        stream_of(make()).batch(0, **BATCH)


def test_a_stream_that_breaks_off_names_its_dataset(make, tmp_path):
    with (tmp_path / "rows" / "1.jsonl").open("a") as file:
        file.write('{"text": \n')
    train = stream_of(make())
    with pytest.raises(UserError, match=r"data.dataset .*rows cannot be read \(JSON parse error"):
        train.batch(0, batch_size=4000, length=16, seed=0)


@pytest.mark.parametrize(("settings", "says"), [
    ({"dataset": "org/name"}, "streaming endless needs a tokenizer, since none can be trained on text that is yet to"),
    ({}, "streaming endless is for a dataset, and none is set; set dataset to"),
    ({"path": "x"}, "streaming endless is for a dataset"),
    ({"streaming": "endles"}, "input should be False, True or 'endless'"),
])
def test_a_stream_without_what_it_needs_is_refused_in_one_sentence(settings, says):
    with pytest.raises(UserError, match=says) as error:
        load_config(None, {"data": {"streaming": "endless", **settings}})
    assert "\n" not in str(error.value)
