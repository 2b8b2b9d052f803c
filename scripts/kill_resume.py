"""Kill a training run repeatedly, restart the same command each time, and compare the end with an uninterrupted run.

    python scripts/kill_resume.py configs/smoke.yaml --kills 50 --work runs/kill-test

Kills are SIGKILL. A third of them hit a checkpoint while it is being written (while its temporary folder exists); the
others come after a random time, during start-up as well as training. Exit code 0: weights, optimiser state and all
metrics except timings are identical byte by byte.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from looped.training.checkpoint import TEMPORARY, list_checkpoints
from looped.training.logs import METRICS, TIMING


def start(config: Path, run_dir: Path, log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "looped.cli", "train", config, "--run", run_dir]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def finish(config: Path, run_dir: Path, log: Path) -> float:
    """Run the command to its end; returns the seconds it took."""
    begin = time.perf_counter()
    code = start(config, run_dir, log).wait()
    if code:
        raise SystemExit(f"the command ended with code {code}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return time.perf_counter() - begin


def wait_for_writing(process: subprocess.Popen, run_dir: Path, number: int) -> bool:
    """Wait until the process writes its `number`-th checkpoint; False if it ends before."""
    seen, before = 0, False
    while process.poll() is None:
        writing = next((run_dir / "checkpoints").glob(f"{TEMPORARY}*"), None) is not None
        seen += writing and not before
        if seen == number:
            return True
        before = writing
    return False


def kill_once(config: Path, run_dir: Path, log: Path, moment: float, aim: int) -> str:
    """Start the command and kill it `moment` seconds after it starts, or starts to write its `aim`-th checkpoint.

    Returns 'writing', 'any time', or 'too late' if it had ended before.
    """
    process = start(config, run_dir, log)
    writing = aim and wait_for_writing(process, run_dir, aim)
    time.sleep(moment)
    late = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return "too late" if late else "writing" if writing else "any time"


def fingerprint(run_dir: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint's tensors and of the metrics without timings."""
    newest = list_checkpoints(run_dir)[0]
    hashes = {f"{newest.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
              for file in sorted(newest.glob("*.safetensors"))}
    lines = [{key: value for key, value in json.loads(line).items() if key not in TIMING}
             for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()]
    return hashes | {METRICS: hashlib.sha256(json.dumps(lines).encode()).hexdigest()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="seed for the times of the kills")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the two runs; emptied first")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    return compare(options.config, options.work, options.kills, random.Random(options.seed))


def compare(config: Path, work: Path, kills: int, dice: random.Random) -> int:
    """Run the test; every run that reaches its end is compared, and another one takes the remaining kills."""
    log, whole, killed = work / "output.log", work / "whole", work / "killed"
    total, start_up = finish(config, whole, log), finish(config, whole, log)  # the second time there is nothing to do
    print(f"uninterrupted: {total:.1f} s, of which {start_up:.1f} s to start", flush=True)
    longest = start_up + max(2 * (total - start_up) / kills, 0.2)  # spreads the kills over about one run
    counts, verdicts = {"writing": 0, "any time": 0}, []
    while sum(counts.values()) < kills:
        aim = dice.randint(1, 3) if sum(counts.values()) % 3 == 0 else 0
        outcome = kill_once(config, killed, log, dice.uniform(0, 0.004 if aim else longest), aim)
        if outcome == "too late":
            verdicts.append(fingerprint(whole) == fingerprint(killed))
            shutil.rmtree(killed)
            continue
        counts[outcome] += 1
        steps = [path.name for path in list_checkpoints(killed)]
        print(f"kill {sum(counts.values())}: {outcome}; newest checkpoint {steps[0] if steps else 'none'}", flush=True)
    finish(config, killed, log)
    verdicts.append(fingerprint(whole) == fingerprint(killed))
    print(json.dumps({"kills": counts, "runs": len(verdicts), "identical": all(verdicts),
                      "hashes": fingerprint(killed)}, indent=1))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
