"""Signals are noted at any moment, a second one ends the process, and silence does, too."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minillm.distributed.ranks import Ranks
from minillm.training.watchdog import BRIEF, LEAST_S, SIGNALS, START, TIMES, Watchdog

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="not on this system"),
    pytest.mark.usefixtures("default_signals"),
]
SLEEPER = """
import hashlib, os, sys, time
from minillm.training.watchdog import Watchdog
with Watchdog({limit}) as watch:
    print("ready", flush=True)
    {body}
"""


def process(body: str, limit: float | None = None, more: str = "") -> subprocess.Popen:
    """A process that has come to `body` inside a watch."""
    code = SLEEPER.format(limit=f"{limit}{more}", body=body)
    made = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert made.stdout.readline() == "ready\n"
    return made


def soon(truth) -> bool:
    """Whether it becomes true."""
    end = time.monotonic() + 30
    while not truth() and time.monotonic() < end:
        time.sleep(0.01)
    return truth()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Watchdog() as watch:
        assert watch.requested_signal(Ranks()) == 0
        os.kill(os.getpid(), number)  # no KeyboardInterrupt
        assert soon(lambda: watch.signal == number) and watch.requested_signal(Ranks()) == number
    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_a_process_that_is_busy_in_c(number):
    """Where Python's own handlers would wait: in one call that never comes back."""
    one = process("hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")
    one.send_signal(number)
    time.sleep(1.5)
    assert one.poll() is None
    one.send_signal(signal.SIGTERM)
    assert one.wait(30) == 143


def test_what_is_passed_on_is_no_second_signal():
    """`timeout` signals its child and then its group, torchrun what its ranks have heard."""
    one = process("time.sleep(1)")
    for _ in range(3):
        one.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert one.wait(30) == 0  # nothing here makes it 143: it was not ended


@pytest.mark.slow
def test_silence_ends_the_process_with_the_stacks():
    one = process("time.sleep(60)", limit=0.5)
    out, err = one.communicate(timeout=30)
    assert one.returncode == 7
    assert err.startswith("train.py: error: no sign of life for ") and "--hang-timeout" in err
    assert 'File "<string>", line 6' in err and "_run" in err  # all threads
    deaf = process("sys.stderr.close(); os.close(2); time.sleep(60)", limit=0.5)
    assert deaf.wait(30) == 7  # though nobody hears of it
    busy = process("for _ in range(15): time.sleep(0.1); watch.alive()", limit=0.5)
    assert busy.wait(30) == 0, busy.stderr.read()


@pytest.mark.slow
def test_who_was_stopped_has_not_been_silent():
    """Ctrl-Z and fg, or a laptop that slept: no time counts in which nothing ran."""
    one = process("for _ in range(15): time.sleep(0.1); watch.alive()", limit=0.5)
    one.send_signal(signal.SIGSTOP)
    time.sleep(2)
    one.send_signal(signal.SIGCONT)
    assert one.wait(30) == 0, one.stderr.read()


def test_patience_grows_with_the_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watchdog()
    assert watch.limit == BRIEF * LEAST_S  # nothing is known, and kernels are compiled

    def steps(*seconds: float) -> None:
        for s in seconds:
            now[0] += s
            watch.step()

    steps(100, 100)  # the first to the second pays for what happens once
    steps(*[1.0] * START)
    assert watch.limit == LEAST_S
    steps(20)
    assert watch.limit == TIMES * 20
    with watch.elsewhere(30):
        now[0] += 1000
        assert watch.limit == 30 * TIMES * 20
    steps(25)
    assert watch.limit == TIMES * 25  # what happened aside is no part of it
    with watch.elsewhere():
        now[0] += 1000
    steps(5)
    assert watch.limit == TIMES * 25
    assert Watchdog(step_s=100.0).limit == BRIEF * TIMES * 100
    assert Watchdog(7.0).limit == 7.0
