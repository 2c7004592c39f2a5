"""The account of wall time: every second is booked once, and what is done again is lost."""

import os
import signal

import pytest

from jaxmem.training import goodput, signals
from jaxmem.training.goodput import KINDS, Goodput


def test_every_second_is_booked_under_one_kind(monkeypatch, tmp_path):
    ticks = iter([10.0, 13.0, 14.0, 18.0])
    monkeypatch.setattr(goodput.time, "monotonic", lambda: next(ticks))
    clock = Goodput({"step": 1.0, "lost": 2.0}, began=4.0)
    for kind in ("startup", "step", "input_wait", "step"):
        clock.lap(kind)
    wanted = {"step": 1 + 3 + 4, "input_wait": 1, "checkpoint": 0, "evaluation": 0, "startup": 6, "lost": 2}
    assert clock.seconds == wanted and clock.metrics() == {
        **{f"goodput/{kind}": value / 17 for kind, value in wanted.items()},
        "goodput/seconds": 17,
    }
    clock.save(tmp_path)
    assert goodput.known(tmp_path, []) == wanted


def test_a_new_run_has_no_account(tmp_path):
    assert goodput.known(tmp_path, [{"step": 1, "loss": 2.0}]) == {}
    assert sum(Goodput().metrics().values()) == 0


def test_what_reached_further_is_known(tmp_path):
    clock = Goodput({"step": 3.0, "startup": 1.0})
    clock.save(tmp_path)
    later = Goodput({"step": 5.0, "startup": 1.0, "checkpoint": 2.0})
    found = goodput.known(tmp_path, [{"step": 4, **clock.metrics()}, {"step": 5, **later.metrics()}])
    assert found == pytest.approx(later.seconds)
    (tmp_path / goodput.FILE).write_text('{"step": 1')
    assert goodput.known(tmp_path, [{"step": 4, **clock.metrics()}]) == pytest.approx(clock.seconds)


def test_what_came_after_the_checkpoint_is_lost_however_often_the_run_is_killed():
    saved = {"step": 10.0, "startup": 4.0, "input_wait": 1.0, "lost": 1.0}
    killed = saved | {"step": 16.0, "checkpoint": 0.5, "evaluation": 2.0}
    once = goodput.resumed(killed, saved)
    assert once == {"step": 10, "input_wait": 1, "checkpoint": 0, "evaluation": 0, "startup": 4, "lost": 9.5}
    again = goodput.resumed(once | {"startup": 7.0, "step": 12.0}, saved)  # killed before another checkpoint
    assert again == once | {"startup": 7, "lost": 11.5}
    assert goodput.resumed({}, {}) == dict.fromkeys(KINDS, 0.0)


def test_signals_inside_one_another_know_of_each_other():
    before = signal.getsignal(signal.SIGTERM)
    with signals.Signals(wait=False) as outer:
        with signals.Signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.caught == "SIGTERM" and not outer.caught
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert outer.caught == "SIGTERM"
    with pytest.raises(signals.Interrupted, match="SIGINT outside of the steps") as caught, signals.Signals(wait=False):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(signals.Interrupted, match="SIGTERM outside"), signals.Signals(wait=False):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except signals.Interrupted as error:  # as jax does while it looks for devices
            raise RuntimeError("no backend") from error
    assert caught.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) == before
