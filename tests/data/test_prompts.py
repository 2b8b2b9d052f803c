"""A prompt ends at a line feed and nowhere else; what is no prompt is said."""

import io
import json
import subprocess
import sys
import warnings

import pytest
from one_sentence import sentence_of

from looped.data.prompts import check_prompt, read_piped, read_prompts


@pytest.mark.parametrize(("raw", "prompts"), [
    ("one\ntwo\n", ["one", "two"]),
    ("one\r\ntwo\r\n", ["one", "two"]),
    ("one\ntwo", ["one", "two"]),
    ("\ufeffone\n", ["one"]),
    ("a\u2028b\u2029c\n", ["a\u2028b\u2029c"]),
    ("a\x0cb\x0bc\x1cd\x1de\x1ef\x85g\n", ["a\x0cb\x0bc\x1cd\x1de\x1ef\x85g"]),
    ("a\rb\n", ["a\rb"]),
    ("a\r\r\n", ["a\r"]),
    ("a\r", ["a\r"]),
    (" \n\t\n", [" ", "\t"]),
])
def test_a_prompt_ends_at_a_line_feed_and_nowhere_else(tmp_path, raw, prompts):
    (tmp_path / "p.txt").write_bytes(raw.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_prompts(tmp_path / "p.txt") == prompts


def test_empty_lines_are_passed_over_with_a_notice(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"one\n\ntwo\r\n\r\n")
    with pytest.warns(UserWarning, match=r"skipped empty lines: 2, 4"):
        assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


@pytest.mark.parametrize(("raw", "says"), [
    (b"", "has no prompts; write one per line"),
    (b"\n\r\n", "has no prompts"),
    (b"one\nna\xefve\n", "is not UTF-8 (byte 0xef at offset 6); convert it"),
    ("one".encode("utf-16"), "begins with the byte-order mark of UTF-16 (ff fe)"),
])
def test_a_file_that_holds_no_prompts_is_refused_in_a_sentence(tmp_path, raw, says):
    (tmp_path / "p.txt").write_bytes(raw)
    message = sentence_of(lambda: read_prompts(tmp_path / "p.txt"))
    assert message.startswith(f"--prompts {tmp_path / 'p.txt'}")
    assert says in message


def test_a_folder_is_no_file_of_prompts(tmp_path):
    assert "cannot read --prompts" in sentence_of(lambda: read_prompts(tmp_path))


def test_a_piped_prompt_comes_byte_for_byte():
    assert read_piped(io.BytesIO("\ufeffa\r\nb\u2028\n".encode())) == "a\r\nb\u2028\n"
    assert "--prompt - is not UTF-8 (byte 0xff at offset 1)" in sentence_of(lambda: read_piped(io.BytesIO(b"a\xff")))


def test_a_prompt_off_the_command_line_is_utf_8():
    code = ("import json, sys; from looped.data.prompts import check_prompt\n"
            "print(json.dumps(check_prompt(sys.argv[1])))")
    given = [subprocess.run([sys.executable, "-X", "utf8", "-c", code, word], capture_output=True, text=True)
             for word in ("naïve".encode(), b"na\xefve")]
    assert json.loads(given[0].stdout) == "naïve"
    assert "UserError: --prompt is not UTF-8 (at character 2)" in given[1].stderr
    assert check_prompt("\ufeff") == "\ufeff"
