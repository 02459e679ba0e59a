"""The circuit breaker alone, on a clock of the test's own."""

from __future__ import annotations

import pytest

from proxy.cluster.circuit import FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_FAILURES, TRIAL_S, WINDOW_S, Circuit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit(clock)


def fail(circuit: Circuit, times: int = MAX_FAILURES) -> None:
    for _ in range(times):
        circuit.failed()


def test_it_opens_after_failures_in_a_row(circuit: Circuit) -> None:
    fail(circuit, MAX_FAILURES - 1)
    assert (circuit.state, circuit.lets_through) == ("closed", True)
    fail(circuit, 1)
    assert (circuit.state, circuit.lets_through) == ("open", False)


def test_a_success_between_keeps_it_closed(circuit: Circuit) -> None:
    for _ in range(4 * MAX_FAILURES):
        fail(circuit, MAX_FAILURES - 1)
        circuit.succeeded()
    assert circuit.state == "closed"


def test_failures_far_apart_do_not_add_up(circuit: Circuit, clock: Clock) -> None:
    for _ in range(3 * MAX_FAILURES):
        fail(circuit, 1)
        clock.now += WINDOW_S / (MAX_FAILURES - 1) + 0.1
    assert circuit.state == "closed"


def test_one_trial_at_a_time(circuit: Circuit, clock: Clock) -> None:
    fail(circuit)
    clock.now += FIRST_PAUSE_S
    assert (circuit.state, circuit.lets_through) == ("half_open", True)
    circuit.sent()
    assert not circuit.lets_through
    clock.now += TRIAL_S
    assert circuit.lets_through


def test_a_good_trial_closes_it(circuit: Circuit, clock: Clock) -> None:
    fail(circuit)
    clock.now += FIRST_PAUSE_S
    circuit.sent()
    circuit.succeeded()
    assert circuit.state == "closed"
    fail(circuit, MAX_FAILURES - 1)
    assert circuit.state == "closed"


def test_bad_trials_open_it_for_longer_and_longer(circuit: Circuit, clock: Clock) -> None:
    fail(circuit)
    pause = FIRST_PAUSE_S
    for _ in range(8):
        clock.now += pause
        circuit.sent()
        circuit.failed()
        pause = min(2 * pause, LONGEST_PAUSE_S)
        opens_at = clock.now + pause
        assert [lets_through_at(circuit, clock, opens_at + late) for late in (-0.01, 0.01)] == [False, True]
        clock.now = opens_at - pause


def lets_through_at(circuit: Circuit, clock: Clock, now: float) -> bool:
    clock.now = now
    return circuit.lets_through


def test_what_ends_while_it_is_open_changes_nothing(circuit: Circuit) -> None:
    fail(circuit)
    circuit.succeeded()
    circuit.failed()
    assert circuit.state == "open"
