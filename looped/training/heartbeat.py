"""Heartbeats of a run's processes: a process that is lost, frozen or fails ends the others, who say which and why.

Each process writes a count to a store of the first one, a few times within the limit (`training.lost_after`). The
first process looks at all of them, the others at the first. A finding ends every process, within an exchange too, where
Python has no say: a thread writes the sentence and ends its process.
"""

import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from looped.errors import UserError, one_line

FINDING = "finding"
"""Key of what ended the run: {"rank", "text", "code"}; the first one that is written stands."""
FOREVER = timedelta(days=365)
AGAIN = "run the same command again, which resumes from the last checkpoint"


class LostProcess(UserError):
    """A process of the run is gone, or has ended with `code`: 1 is a failure after which trying again makes sense."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.exit_code = code


class Watch:
    """The heartbeat of one process. rank, num: of the processes; limit: seconds without one after which a process
    is lost; share: a function that gives every process the first one's object."""

    def __init__(self, rank: int, num: int, limit: float, share: Callable[[Any], Any], *, host: str = "127.0.0.1"):
        from torch.distributed import TCPStore

        self.rank, self.num, self.limit = rank, num, limit
        self.pause: float = min(1.0, limit / 10)
        self.gone: float = min(limit, 5.0)  # after an exchange has failed: it is known that somebody is missing
        patience = timedelta(seconds=limit)
        self.server = TCPStore("0.0.0.0", 0, num, True, patience, False) if rank == 0 else None
        port = share(self.server.port if self.server else None)
        self.store = TCPStore(host, port, num, False, patience, False)  # of the main thread, which may wait long
        self.beats = TCPStore(host, port, num, False, patience, False)
        self.num_works = 0
        self.in_hand = threading.Event()  # the main thread is ending, or has found out by itself
        self.over = threading.Event()
        self.beats.set(self._key("who", rank), f"process {os.getpid()} on {platform.node()}")
        self._beat(0)
        self.num_rounds = 0
        self.found: dict[str, Any] | None = None
        self.threads = [threading.Thread(target=work, name=work.__name__, daemon=True)
                        for work in (self._ask, self._judge)]
        share(None)  # every name and first heartbeat is written
        self.watched = range(1, num) if rank == 0 else range(1)
        self.names: dict[int, str] = {each: self.beats.get(self._key("who", each)).decode() for each in self.watched}
        for thread in self.threads:
            thread.start()

    @staticmethod
    def _key(name: str, rank: int) -> str:
        return f"{name}/{rank}"

    # ---- the main thread ---------------------------------------------------------------------------------------------

    def first(self, work: Callable[[], Any]) -> Any:
        """Result of `work()` on the first process, None on the others, who wait however long it takes. All raise its
        UserError."""
        return self._work(range(1), work)

    def every(self, work: Callable[[], Any]) -> Any:
        """Result of `work()` on this process, once all have done theirs, however long it takes. All raise the UserError
        of any."""
        return self._work(range(self.num), work)

    def _work(self, ranks: range, work: Callable[[], Any]) -> Any:
        """Result of `work()` on this process, None if it is not in `ranks`, once those have done theirs."""
        self.num_works += 1
        problem, value = None, None
        if self.rank in ranks:
            try:
                value = work()
            except UserError as error:
                problem = str(error)
        keys = [self._key(f"work/{self.num_works}", rank) for rank in ranks]
        try:
            if self.rank in ranks:
                self.store.set(keys[self.rank], json.dumps(problem))
            self.store.wait(keys, FOREVER)
            problems = [json.loads(self.store.get(key)) for key in keys]
        except RuntimeError as error:
            raise self.reason(error) from None
        for said in problems:
            if said is not None:
                raise UserError(said)
        return value

    def tell(self, text: str, code: int) -> None:
        """Tell the others why this process ends."""
        self._find(self.rank, f"rank {self.rank} ended: {text}", code)

    def reason(self, error: BaseException) -> BaseException:
        """The reason for a failed exchange: the process that is missing, or the error itself if none is."""
        self.in_hand.set()
        deadline = time.monotonic() + self.gone + 3 * self.pause + 2
        try:
            self.store.set("suspicion", str(self.rank))
            while time.monotonic() < deadline:
                if self.store.check([FINDING]):
                    return self._lost(json.loads(self.store.get(FINDING)))
                time.sleep(self.pause / 4)
        except RuntimeError:
            return LostProcess(self._text(0, "its connection is closed"))
        return error

    def close(self, *, failed: bool = False) -> None:
        """End the threads. The first process, which has the store, waits for the others: until they have come here too,
        or, if it failed, for the moment that they need to read why."""
        if failed:
            self.in_hand.set()
        deadline = time.monotonic() + self.gone + 2 if failed else math.inf
        with suppress(RuntimeError):  # it is over, for whatever reason
            self.beats.set(self._key("left", self.rank), "1")
            while self.rank == 0 and self._awaited() and time.monotonic() < deadline:
                if self.found is not None and not failed:
                    break  # somebody is lost who has nothing left to do
                time.sleep(self.pause / 10)
        self.over.set()
        for thread in self.threads:
            thread.join(self.gone)

    def _awaited(self) -> bool:
        """True while a process may still read the store: all but those that have left or are lost."""
        lost = json.loads(self.beats.get(FINDING))["rank"] if self.beats.check([FINDING]) else 0
        return not self.beats.check([self._key("left", rank) for rank in range(self.num) if rank != lost])

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Write heartbeats and read those of others, round after round. It may wait without end for a store whose
        process is frozen, so that a thread of its own judges."""
        seen: dict[int, tuple[str, int]] = {}
        while self.found is None and not self.over.wait(self.pause):
            try:
                self._beat(self.num_rounds)
                if self.beats.check([FINDING]):
                    self.found = json.loads(self.beats.get(FINDING))
                limit = self.gone if self.beats.check(["suspicion"]) else self.limit
                for rank in self.watched:
                    self._look(rank, seen, limit)
                self.num_rounds += 1
            except RuntimeError:  # the store, and with it the first process
                self.found = self._lost_first("its connection is closed")

    def _judge(self) -> None:
        """End the process if something is found, or if the first process does not answer. Pauses are counted, not
        seconds, so that nobody is lost by the sleep of a machine."""
        heard, pauses = -1, 0
        while self.found is None and not self.over.wait(self.pause):
            pauses = pauses + 1 if heard == self.num_rounds else 0
            heard = self.num_rounds
            if pauses * self.pause > self.limit:
                self.found = self._lost_first(f"no heartbeat for {self.limit:.0f} s")
        if self.found is not None and not self.over.is_set():
            self._end(self.found)

    def _lost_first(self, why: str) -> dict[str, Any]:
        return {"rank": 0, "text": self._text(0, why), "code": 1}

    def _beat(self, count: int) -> None:
        self.beats.set(self._key("beat", self.rank), str(count))

    def _look(self, rank: int, seen: dict[int, tuple[str, int]], limit: float) -> None:
        beat = self.beats.get(self._key("beat", rank)).decode()
        if beat != seen.get(rank, ("", 0))[0]:
            seen[rank] = beat, self.num_rounds
        elif (self.num_rounds - seen[rank][1]) * self.pause > limit and not self.beats.check([self._key("left", rank)]):
            self._find(rank, self._text(rank, f"no heartbeat for {limit:.0f} s"), 1)

    def _text(self, rank: int, why: str) -> str:
        return f"rank {rank} ({self.names[rank]}) is lost, {why}; {AGAIN}"

    def _find(self, rank: int, text: str, code: int) -> None:
        finding = json.dumps({"rank": rank, "text": text, "code": code})
        with suppress(RuntimeError):  # the first process is gone, which the others find out by themselves
            self.beats.compare_set(FINDING, "", finding)

    def _lost(self, finding: dict[str, Any]) -> BaseException:
        return LostProcess(finding["text"], finding["code"])

    def _end(self, finding: dict[str, Any]) -> None:
        """End the process, unless its main thread does so soon."""
        if self.over.wait(self.gone + 3 * self.pause + 5 if self.in_hand.is_set() else 3 * self.pause + 2):
            return
        sys.stdout.flush()
        os.write(2, f"looped: {finding['text']}\n".encode())
        if finding["rank"]:  # else the store may not answer
            with suppress(RuntimeError):
                self.beats.set(self._key("left", self.rank), "1")
        os._exit(finding["code"])


@contextmanager
def watched(accelerator: Any, limit: float) -> Iterator[Watch | None]:
    """Watch the processes of a run inside the block; None if there is one. An exception inside is told to the others,
    and one of an exchange is raised as the LostProcess that caused it."""
    if accelerator.num_processes == 1:
        yield None
        return
    from accelerate.utils import broadcast_object_list

    def share(value: Any) -> Any:
        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    failed = True
    watch = Watch(accelerator.process_index, accelerator.num_processes, limit, share,
                  host=os.environ.get("MASTER_ADDR", "127.0.0.1"))
    try:
        yield watch
        failed = False
    except UserError as error:
        watch.tell(str(error), error.exit_code)
        raise
    except RuntimeError as error:
        found = watch.reason(error)
        if found is error:
            watch.tell(f"{type(error).__name__}: {one_line(error)}", 1)
            raise
        raise found from None
    except BaseException as error:
        watch.tell(f"{type(error).__name__}: {one_line(error)}", 1)
        raise
    finally:
        watch.close(failed=failed)
