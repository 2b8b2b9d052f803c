"""Time and peak memory of the first and the second start on synthetic text of several sizes.

    python scripts/prepare_scale.py --megabytes 10 100 --form jsonl

Each start is a process of its own, which calls `looped.data.text.prepare`; its peak is the resident memory that the
system counted. Lines: megabytes, form, start, seconds of `prepare` alone, those of the processor, peak in MB,
fingerprint and hash of all tokens.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = 60_000
DOCUMENT = 2_000
"""Bytes of a document, about."""

START = """
import hashlib, json, resource, sys, time
from looped.config.data import DataConfig
from looped.data.text import prepare
data = DataConfig(**json.loads(sys.argv[1]))
start, worked = time.perf_counter(), time.process_time()
text = prepare(data)
seconds, worked = time.perf_counter() - start, time.process_time() - worked
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
digest = hashlib.sha256()
for tokens in (text.train.tokens, text.heldout.tokens):
    digest.update(tokens)
print(f"{seconds:8.2f} s  {worked:8.2f} s  {peak:6.0f} MB  {text.fingerprint[:8]} {digest.hexdigest()[:12]}")
"""


def write_text(path: Path, megabytes: int, form: str) -> None:
    """Documents of words drawn with Zipf's frequencies: one JSON object a line, or one text with line breaks."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, weights=range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / (rank + 3) for rank in range(WORDS)]
    pool = rng.choices(words, weights=weights, k=2_000_000)
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        while written < megabytes * 1_000_000:
            start = rng.randrange(len(pool) - 400)
            text = " ".join(pool[start : start + 400])[:DOCUMENT]
            file.write((json.dumps({"text": text}) if form == "jsonl" else text) + "\n")
            written += len(text) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--form", choices=["jsonl", "txt"], default="jsonl")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to keep the texts; default: nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for megabytes in given.megabytes:
            path = folder / f"{megabytes}.{given.form}"
            if not path.exists():
                write_text(path, megabytes, given.form)
            settings = {"path": [str(path)], "max_bytes": 4_000_000 * megabytes,
                        "cache_dir": str(Path(scratch, f"c{megabytes}"))}
            for start in range(given.starts):
                ran = subprocess.run([sys.executable, "-c", START, json.dumps(settings)], capture_output=True,
                                     text=True, check=True)
                print(f"{megabytes:6} MB {given.form}  start {start + 1} {ran.stdout.rstrip()}", flush=True)


if __name__ == "__main__":
    main()
