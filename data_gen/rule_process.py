"""`answers.judge` in a process of its own, which is killed when a verdict takes too long.

A thread cannot be stopped inside a regular expression, which holds the interpreter; a process can.
The child also sets itself an alarm whose default action ends it, for a parent that is gone by then.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from data_gen.answers import OtherWords, Reference, Verdict

JUDGE = "data_gen.answers:judge"
_START = 60.0  # seconds that a busy machine may take to start Python
_READY = b"ready\n"


class RuleProcess:
    """Verdicts by rule within `seconds` each; a child that passes them is killed, and the next
    verdict starts another. Safe to share between threads, which take turns."""

    def __init__(self, seconds: float, function: str = JUDGE) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds={seconds}; a time limit should be above 0")
        self._seconds = seconds
        self._function = function
        self._turn = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self.killed = 0

    def judge(
        self,
        response: str,
        reference: str | Reference,
        options: Mapping[str, str] | None = None,
        *,
        other_words: OtherWords = "false",
    ) -> Verdict:
        """As `answers.judge`, or unscored after the time limit."""
        key = reference if isinstance(reference, Reference) else Reference(reference)
        request = {"response": response, "reference": asdict(key)}
        request |= {"options": None if options is None else dict(options)}
        with self._turn:
            reply = self._ask(json.dumps({**request, "other_words": other_words}).encode() + b"\n")
            if not reply:
                self._end()
                self.killed += 1
                late = f"no verdict by rule within {self._seconds:g} s"
                ended = "the process that judges by rule ended"
                return Verdict("unscored", late if reply is None else ended)
        outcome, reason = json.loads(reply)
        return Verdict(outcome, reason)

    def close(self) -> None:
        """End the child, if there is one."""
        with self._turn:
            self._end()

    def __enter__(self) -> "RuleProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, line: bytes) -> bytes | None:
        """The child's reply; None when its time is up, nothing when it has ended."""
        if self._child is None:
            self._child = self._start()
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
        except BrokenPipeError:
            return b""
        return _read_line(self._child, self._seconds)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "data_gen.rule_process", self._function]
        child = subprocess.Popen(
            [*command, str(2 * self._seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        weakref.finalize(self, _kill, child)
        if _read_line(child, _START) != _READY:
            _kill(child)
            raise RuntimeError(
                f"{' '.join(command)}: the process that judges by rule did not start"
            )
        return child

    def _end(self) -> None:
        if self._child is not None:
            _kill(self._child)
            self._child = None


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None and not pipe.closed:
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # what was written to it has no reader any more


def _read_line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
            return None
        piece = os.read(child.stdout.fileno(), 65536)
        if not piece:
            return b""
        line += piece
    return line


# --- the child ----------------------------------------------------------------------------------


def main(function: str, seconds: float) -> None:
    """Judge requests from standard input, a line each, until it is closed."""
    module, _, name = function.partition(":")
    judge = getattr(importlib.import_module(module), name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it, also after Ctrl-C
    _say(_READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = _judge_one(judge, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(json.dumps(reply).encode() + b"\n")


def _judge_one(judge: Callable[..., Verdict], request: dict[str, Any]) -> tuple[str, str]:
    settings = request["reference"]
    key = Reference(**{**settings, "aliases": tuple(settings["aliases"])})
    verdict = judge(
        request["response"], key, request["options"], other_words=request["other_words"]
    )
    return verdict.outcome, verdict.reason


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
