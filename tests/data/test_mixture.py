"""Several sources with weights: their turns, their own epochs, one tokenizer, and messages by the source's name."""

import errno
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from looped.config import load_config
from looped.config.data import DataConfig
from looped.data import manifest, mixture, text_sources, token_cache
from looped.data.from_config import located, open_data
from looped.data.mixed_stream import MixedStream
from looped.data.mixture import cached_mixture, find_mixture, in_proportion, shares_said
from looped.data.text import find_text, prepare
from looped.data.token_windows import TokenStream
from looped.errors import UserError

WEIGHTS = {"code": 0.3, "web": 0.5, "wiki": 0.2}
BATCH = {"batch_size": 8, "length": 16, "seed": 5}


@pytest.fixture
def folders(tmp_path, texts):
    """A folder of text per source, all different."""
    texts.rename(tmp_path / "web")
    for name, lines in (("code", "def f{0}(x):\n    return {0} * x\n"), ("wiki", "The {0}th king was born in {1}.\n")):
        (tmp_path / name).mkdir()
        for file in range(12):
            (tmp_path / name / f"{file:02}.txt").write_text(
                "".join(lines.format(line + 40 * file, line**2) for line in range(40)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def mixed(folders):
    """A DataConfig of the three sources; keywords change it."""
    def config(names=tuple(WEIGHTS), **settings) -> DataConfig:
        sources = {name: {"path": str(folders / name), "weight": WEIGHTS[name]} for name in names}
        return DataConfig(**{"mixture": sources, "vocab_size": 300, "length": 16, "heldout": 0.2,
                             "cache_dir": str(folders / "cache"), **settings})
    return config


def windows_of(text):
    """Training window -> (its source, the number of its last copy there)."""
    return {part.train.tokens[16 * window : 16 * window + 17].astype(np.int64).tobytes(): (name, window)
            for name, part in text.parts.items() for window in range(part.train.windows(16))}


# ---- the order


def test_every_source_has_its_share_of_the_rows_and_each_window_once_per_epoch(mixed):
    text = find_mixture(mixed()).open()
    windows = {name: part.train.windows(16) for name, part in text.parts.items()}
    steps = 11 * max(windows.values()) // 8
    known = windows_of(text)
    seen = [known[row.numpy().tobytes()] for step in range(steps) for row in text.train.batch(step, **BATCH)]
    for name, share in text.shares.items():
        mine = [window for source, window in seen if source == name]
        assert abs(len(mine) - len(seen) * share) < 1 + text.train.quotas.period
        assert len(mine) > 2 * windows[name]
        first, second = (mine[epoch * windows[name] : (epoch + 1) * windows[name]] for epoch in range(2))
        each = [known[part.numpy().tobytes()][1] for part in text.parts[name].train.sequences(windows[name], 16)]
        assert sorted(first) == sorted(second) == sorted(each)
        assert first != second


def test_rows_are_the_same_however_a_step_is_split(mixed):
    train = find_mixture(mixed()).open().train
    whole = train.batch(7, **BATCH)
    parts = [train.batch(7, rows=range(first, first + 2), **BATCH) for first in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(train.batch(7, **BATCH | {"seed": 6}), whole)


def test_a_mixture_of_one_source_has_the_order_of_that_source(mixed):
    text = find_mixture(mixed(names=["web"])).open()
    stream = TokenStream("train", text.parts["web"].train.tokens, end_of_text=text.end_of_text)
    for step in (0, 3, 200):
        assert torch.equal(text.train.batch(step, **BATCH), stream.batch(step, **BATCH))


def test_sources_of_equal_length_have_orders_of_their_own(mixed):
    part = find_mixture(mixed()).open().parts["web"].train
    starts = [part.starts(np.arange(20), 16, seed=0, stream=stream).tolist() for stream in range(3)]
    assert starts[0] != starts[1] != starts[2]
    assert starts[0] == part.starts(np.arange(20), 16, seed=0).tolist()


def test_the_line_of_a_row_names_its_source_and_documents(mixed):
    text = find_mixture(mixed()).open()
    known = windows_of(text)
    for row, line in zip(text.train.batch(3, **BATCH), text.train.describe(3, **BATCH), strict=True):
        name, window = known[row.numpy().tobytes()]
        assert f": {name}, train tokens {16 * window}-{16 * window + 16} (" in line
        assert ".txt" in line
    assert text.train.describe(3, rows=range(2, 4), **BATCH) == text.train.describe(3, **BATCH)[2:4]


def test_the_order_of_a_billion_windows_of_each_source_costs_nothing(mixed):
    huge = np.broadcast_to(np.uint16(1), 10**9 * 16 + 1)
    shares = mixed().shares
    train = MixedStream("train", {name: TokenStream("train", huge, end_of_text=0) for name in shares}, shares)
    train.batch(0, **BATCH)
    begun = time.process_time()
    for step in range(50):
        train.batch(step * 10**7, **BATCH)
    assert (time.process_time() - begun) / 50 < 0.02


def test_three_sources_that_take_turns_keep_their_stored_orders(mixed, monkeypatch):
    """An order of a few million windows takes half a second to sort: once per epoch, not once per step."""
    from looped.data import epoch_order
    sorts = []
    drawn = epoch_order.draws
    monkeypatch.setattr(epoch_order, "draws", lambda *args, **more: sorts.append(args) or drawn(*args, **more))
    train = find_mixture(mixed()).open().train
    for step in range(6):
        train.batch(step, **BATCH | {"seed": 77})
    assert len(sorts) <= 2 * len(WEIGHTS)


# ---- one tokenizer


def test_a_tokenizer_is_trained_on_all_sources_in_proportion(mixed, monkeypatch):
    seen = []
    train = mixture.train_tokenizer
    monkeypatch.setattr(mixture, "train_tokenizer", lambda pieces, size: train(seen.extend(pieces) or seen, size))
    text = find_mixture(mixed()).open()
    assert {part.tokenizer.json() for part in text.parts.values()} == {text.tokenizer.json()}
    sizes = {"code": 0, "web": 0, "wiki": 0}
    for piece in seen:
        sizes["code" if "def f" in piece else "wiki" if "king" in piece else "web"] += len(piece)
    for name, size in sizes.items():
        assert size / sum(sizes.values()) == pytest.approx(WEIGHTS[name], abs=0.05)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1, 2.5, 17])
def test_pieces_are_taken_and_repeated_in_any_proportion(ratio):
    pieces = [f"{number} " * 1500 for number in range(60)]
    total, most = sum(map(len, pieces)), mixture.CHUNK
    assert 0 <= sum(map(len, in_proportion(pieces, ratio))) - ratio * total <= most
    assert next(in_proportion(pieces, ratio))[:4] == pieces[0][:4]
    if ratio == 1:
        assert "".join(in_proportion(pieces, 1)) == "".join(pieces)


def test_a_given_tokenizer_reads_all_sources_and_shares_their_token_files(mixed, folders, tmp_path):
    (tmp_path / "t.json").write_text(find_mixture(mixed()).open().tokenizer.json(), encoding="utf-8")
    data = mixed(tokenizer=str(tmp_path / "t.json"))
    text = find_mixture(data).open()
    alone = prepare(data.of_source("wiki"))
    assert text.parts["wiki"].fingerprint == alone.fingerprint
    assert np.array_equal(text.parts["wiki"].train.tokens, alone.train.tokens)
    assert text.tokenizer.json() == alone.tokenizer.json()


# ---- found, cached, identified


def test_a_second_start_reads_no_file_and_encodes_nothing(mixed, folders, monkeypatch):
    for path in folders.glob("*/*.txt"):
        os.utime(path, ns=(time.time_ns() - 10**12,) * 2)
    first = find_mixture(mixed()).open()
    monkeypatch.setattr(text_sources, "read_file", None)
    monkeypatch.setattr(token_cache, "_build", None)
    monkeypatch.setattr(mixture, "train_tokenizer", None)
    second = find_mixture(mixed())
    assert second.fingerprint == first.fingerprint
    assert second.facts.items() <= first.facts.items()
    assert second.open().facts == first.facts


def test_a_prepared_mixture_is_opened_from_a_cache_that_cannot_be_written(mixed, monkeypatch):
    first = find_mixture(mixed()).open()

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for module in (mixture, manifest, token_cache):
        monkeypatch.setattr(module, "lock_for", refuse)
        monkeypatch.setattr(module, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert find_mixture(mixed()).open().facts == first.facts
    with pytest.raises(UserError, match=r"the token cache .* cannot be used"):  # a positive control: not prepared
        find_mixture(mixed(vocab_size=290)).open()


def test_text_share_and_name_of_a_source_are_part_of_the_fingerprint(mixed, folders):
    before = find_mixture(mixed())
    sources = {name: source.model_dump() for name, source in mixed().mixture.items()}
    assert find_mixture(mixed(mixture=dict(reversed(sources.items())))).fingerprint == before.fingerprint
    scaled = {name: source | {"weight": 2 * source["weight"]} for name, source in sources.items()}
    assert find_mixture(mixed(mixture=scaled)).fingerprint == before.fingerprint  # the same shares
    other = {**sources, "web": sources["web"] | {"weight": 0.6}}
    renamed = {"net" if name == "web" else name: source for name, source in sources.items()}
    (folders / "wiki" / "03.txt").write_text("other", encoding="utf-8")
    found = [find_mixture(mixed()), find_mixture(mixed(mixture=other)), find_mixture(mixed(mixture=renamed))]
    assert len({each.fingerprint for each in (before, *found)}) == 4
    assert {name for name, value in found[0].facts.items() if value != before.facts[name]} == {"fingerprint of wiki"}


def test_the_whole_has_the_sums_and_the_mean_by_shares(mixed):
    text = find_mixture(mixed(), num_sequences=1000).open()
    assert len(text.train) == sum(len(part.train) for part in text.parts.values())
    mean = sum(WEIGHTS[name] * part.bytes_per_token for name, part in text.parts.items())
    assert text.bytes_per_token == pytest.approx(mean)
    assert text.nats_to_bits_per_byte(8 * math.log(2) * mean) == pytest.approx(8)
    for name, part in text.parts.items():
        assert text.epochs[name] == pytest.approx(1000 * WEIGHTS[name] / part.train.windows(16))
        assert f"{WEIGHTS[name]} {name}, {part.counted}; {text.epochs[name]:.3g} epochs in the run" in text.summary
    assert "epochs" not in find_mixture(mixed()).open().summary  # its length is not known


def test_epochs_are_said_without_reading_once_the_text_is_prepared(mixed, monkeypatch):
    (line,) = shares_said(mixed(), 1000)
    assert "0.3 code: 300 sequences; 0.5 web: 500 sequences; 0.2 wiki: 200 sequences" in line
    found = find_mixture(mixed(), num_sequences=1000)
    assert found.prepare().count(": prepared: ") == 3
    assert found.prepare().count(": already prepared: ") == 3
    monkeypatch.setattr(manifest, "remembered", None)
    (line,) = shares_said(mixed(), 1000)
    assert f"500 sequences, {found.open().epochs['web']:.3g} epochs" in line
    assert shares_said(DataConfig(), 1000) == []
    assert "epochs" not in shares_said(mixed(mixture={"x": {"path": "nowhere"}}), 10)[0]


def test_a_mixture_that_is_gone_is_opened_from_the_cache(mixed, folders):
    text = find_mixture(mixed()).open()
    (folders / "web").rename(folders / "gone")
    with pytest.raises(UserError, match=r"^data.mixture.web.path .*web does not exist"):
        find_mixture(mixed())
    again = cached_mixture(mixed(), text.fingerprint, text.tokenizer, text.facts)
    assert again is not None
    assert torch.equal(again.train.batch(3, **BATCH), text.train.batch(3, **BATCH))
    assert again.facts["contents"] == text.facts["contents"]
    assert cached_mixture(mixed(), text.fingerprint, text.tokenizer, {}) is None


def test_relative_paths_of_sources_are_found_in_the_folder_of_the_config(folders):
    config = load_config(None, {"data.mixture": "{web: {path: web}, code: {path: [code/0*.txt]}, other: {path: none}}"})
    found = located(config, folders).data.mixture
    assert [found[name].path for name in ("web", "code", "other")] == [
        (str(folders / "web"),), (str(folders / "code/0*.txt"),), ("none",)]


# ---- held-out text


def test_held_out_sequences_are_allotted_by_share_and_come_in_turn(mixed):
    heldout = find_mixture(mixed()).open().heldout
    assert heldout.allotted(10) == {"code": 3, "web": 5, "wiki": 2}
    assert heldout.allotted(3) == {"code": 1, "web": 1, "wiki": 1}
    assert sum(heldout.allotted(37).values()) == 37
    places = heldout.places(10, 16)
    assert sorted(places["source"][:4]) == ["code", "web", "web", "wiki"]
    rows = heldout.sequences(10, 16)
    for row, source, start in zip(rows, places["source"], places["start"], strict=True):
        assert np.array_equal(row.numpy(), heldout.parts[source].tokens[start : start + 17])
    assert torch.equal(rows[heldout.rows_of("code", 10, 16)], heldout.parts["code"].sequences(3, 16))


def test_more_sequences_than_the_shares_allow_are_not_given(mixed):
    heldout = find_mixture(mixed()).open().heldout
    most = heldout.windows(16)
    assert most == min(int(part.windows(16) / WEIGHTS[name]) for name, part in heldout.parts.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(heldout.sequences(most, 16)) == most
    with pytest.warns(UserWarning, match="in the proportions of the mixture"):
        assert len(heldout.sequences(most + 1, 16)) == most


def test_figures_are_the_mean_by_shares_with_those_of_each_source_beside(mixed):
    text, asked = find_mixture(mixed()).open(), {}

    def figures(part, num):
        asked[part.source] = num
        return {"loss": float(len(asked)), "bits": 1.0}

    found = text.by_source(20, figures)
    assert list(asked.values()) == [6, 10, 4]
    assert found["loss"] == pytest.approx(0.3 * 1 + 0.5 * 2 + 0.2 * 3)
    assert (found["bits"], found["loss/web"], found["loss/wiki"]) == (1.0, 2.0, 3.0)
    alone = prepare(mixed().of_source("web"))
    assert alone.by_source(20, lambda part, num: {"loss": num}) == {"loss": 20}


# ---- settings


@pytest.mark.parametrize(("flags", "says"), [
    ({"data.path": "x"}, "mixture and path are both set; keep one, or make path one of the sources"),
    ({"data.mixture.web.weight": 0}, "data.mixture.web.weight: input should be greater than 0"),
    ({"data.mixture.web.weight": 1e9}, r"mixture.code has 1e-09 of the training sequences, and 0.0001 is the least"),
    ({"data.mixture.web.wieght": 2}, "unknown setting 'data.mixture.web.wieght'; did you mean 'weight'"),
    ({"data.mixture.web.dataset": "org/name"}, "data.mixture.web: path and dataset are both set; keep one"),
    ({"data.mixture": {"a/b": {}}}, "mixture has a source 'a/b'; name it by letters"),
])
def test_a_bad_mixture_is_named_in_one_sentence(tmp_path, flags, says):
    (tmp_path / "c.yaml").write_text("data: {mixture: {web: {path: web}, code: {path: code}}}", encoding="utf-8")
    with pytest.raises(UserError, match=says) as error:
        load_config(tmp_path / "c.yaml", flags)
    assert "\n" not in str(error.value)


def test_warnings_and_errors_name_the_setting_of_the_source(mixed, folders):
    sources = {"web": {"path": str(folders / "web"), "max_bytes": 3000}, "code": {"path": str(folders / "code")}}
    with pytest.warns(UserWarning, match=r"^data.mixture.web.max_bytes 3,000 cuts the text off in "):
        find_mixture(mixed(mixture=sources))
    data = mixed(mixture={name: {"path": str(folders / name)} for name in ("web", "code")}, length=4000)
    with pytest.raises(UserError, match=r"^data.mixture.code: data.length 4000 needs 4001 tokens"):
        find_mixture(data).open()


def test_a_source_takes_the_field_and_the_limit_of_the_whole_unless_it_has_its_own():
    data = DataConfig(text_field="body", max_bytes=500, mixture={"a": {}, "b": {"text_field": "x", "max_bytes": 7}})
    assert [(data.of_source(name).text_field, data.of_source(name).max_bytes) for name in "ab"] == [
        ("body", 500), ("x", 7)]
    assert data.of_source("a").mixture == {}


def test_without_paths_a_source_is_the_standard_library(tmp_path):
    config = load_config(None, {"data.mixture": {"library": {"max_bytes": 300_000}}, "data.length": 16,
                                "data.vocab_size": 300, "data.cache_dir": str(tmp_path),
                                "evaluation.prompt_length": 8})
    with pytest.warns(UserWarning, match="data.mixture.library.max_bytes 300,000 cuts"):
        text = open_data(config)
    assert "standard library of Python" in text.facts["source"]


# ---- files of several sources


@pytest.fixture
def overlapping(mixed, folders):
    """A DataConfig of a folder, and of folders and globs of files in it."""
    def config(**paths) -> DataConfig:
        sources = {name: {"path": str(folders / "web" / path)} for name, path in paths.items()}
        return mixed(mixture=sources)
    (folders / "web" / "good").mkdir()
    for number in range(40):
        (folders / "web" / "good" / f"{number:02}.txt").write_text(f"the {number}th good text\n" * 30, encoding="utf-8")
    return config


def sides_of(part):
    """Text of a document -> True if it is held out."""
    return {document.text: heldout for heldout, document in part.split.sides(part.reading.documents())}


def test_a_file_of_two_sources_is_held_out_in_both_or_in_neither(overlapping):
    data = overlapping(all=".", good="good")
    parts = find_mixture(data).parts
    everything, good = (sides_of(part) for part in parts.values())
    assert len(good) == 40
    assert set(good.values()) == {False, True}
    assert good.items() <= everything.items()
    alone = sides_of(find_text(data.of_source("good")))  # a positive control: by its own paths the sides are others
    assert not alone.items() <= everything.items()


def test_sources_that_share_no_file_have_the_sides_and_the_tokens_that_they_have_alone(mixed):
    for name, part in find_mixture(mixed()).parts.items():
        assert part.fingerprint == find_text(mixed().of_source(name)).fingerprint


def test_a_mixture_of_shared_files_is_known_without_reading_it_again(overlapping, monkeypatch):
    data = overlapping(all=".", good="good")
    first = find_mixture(data)
    monkeypatch.setattr(text_sources, "read_file", None)
    assert find_mixture(data).fingerprint == first.fingerprint


@pytest.mark.parametrize(("paths", "why"), [
    ({"all": ".", "one": "good/03.txt"}, "a source of one document is cut in two"),
    ({"all": ".", "few": "good/0[1-3].txt"}, "changes sides where all documents of a source would be on one")])
def test_a_file_that_one_source_would_train_on_and_another_hold_out_is_refused(overlapping, paths, why):
    with pytest.raises(UserError, match=rf"good/0\d.txt is in data.mixture.all and in data.mixture.\w+, .*{why}"):
        find_mixture(overlapping(**paths))
