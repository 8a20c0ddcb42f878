"""Moving windows: never more than the limit within any period, and no more memory than was promised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.engine import windows as module
from nanogpt.engine.windows import MAX_ENTRIES, Rule, Windows


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


TEN = [Rule("requests", 10, 60)]


def test_a_window_moves_and_does_not_jump(clock: Clock) -> None:
    """A fixed window admits twice the limit around its border."""
    windows = Windows(clock)
    for _ in range(10):
        assert windows.take("a", TEN).admitted
        clock.now += 5
    refused = windows.take("a", TEN)
    assert not refused.admitted
    assert refused.states[0].remaining == 0
    assert refused.states[0].retry_after_s == pytest.approx(10)  # the first was 50 s ago
    clock.now += 9.9
    assert not windows.take("a", TEN).admitted
    clock.now += 0.2
    assert windows.take("a", TEN).admitted
    assert not windows.take("a", TEN).admitted


def test_clients_do_not_count_for_each_other(clock: Clock) -> None:
    windows = Windows(clock)
    for _ in range(10):
        windows.take("a", TEN)
    assert windows.take("b", TEN).states[0].remaining == 9


def test_what_is_refused_by_one_rule_is_counted_by_none(clock: Clock) -> None:
    """Otherwise whoever keeps knocking at the small limit would use up the large one."""
    windows = Windows(clock)
    rules = [Rule("requests", 2, 1), Rule("requests", 5, 60)]
    for _ in range(50):
        windows.take("a", rules)
    assert [state.remaining for state in windows.take("a", rules).states] == [0, 3]
    clock.now += 1
    taken = windows.take("a", rules)
    assert taken.admitted
    assert [state.remaining for state in taken.states] == [1, 2]


def test_a_limit_that_is_changed_goes_on_with_what_was_counted(clock: Clock) -> None:
    windows = Windows(clock)
    for _ in range(5):
        windows.take("a", TEN)
    assert not windows.take("a", [Rule("requests", 5, 60)]).admitted
    assert windows.take("a", TEN).states[0].remaining == 4


TOKENS = [Rule("tokens", 100, 60)]


def test_what_is_held_counts_in_full_and_what_was_used_afterwards(clock: Clock) -> None:
    windows = Windows(clock)
    assert windows.take("a", TOKENS, 80, hold="h", hold_s=300).admitted
    assert not windows.take("a", TOKENS, 21).admitted
    clock.now += 200  # a long text: it still is written, and counts
    assert not windows.take("a", TOKENS, 21).admitted
    windows.settle("a", TOKENS, "h", 30)
    assert windows.take("a", TOKENS, 70).admitted
    clock.now += 59.9
    assert not windows.take("a", TOKENS, 1).admitted
    clock.now += 0.2
    assert windows.take("a", TOKENS, 100).admitted


def test_a_hold_is_settled_once_and_never_for_more_than_it_was(clock: Clock) -> None:
    windows = Windows(clock)
    windows.take("a", TOKENS, 40, hold="h", hold_s=300)
    windows.settle("a", TOKENS, "h", 1000)
    windows.settle("a", TOKENS, "h", 0)
    windows.settle("a", TOKENS, "never seen", 5)
    windows.settle("nobody", TOKENS, "h", 5)
    assert windows.take("a", TOKENS, 60).states[0].remaining == 0


def test_a_hold_that_nobody_settles_leaves_after_its_deadline(clock: Clock) -> None:
    windows = Windows(clock)
    windows.take("a", TOKENS, 100, hold="h", hold_s=300)
    clock.now += 359
    assert not windows.take("a", TOKENS, 1).admitted
    clock.now += 2
    assert windows.take("a", TOKENS, 100).admitted


def test_memory_is_bounded_by_entries(clock: Clock) -> None:
    windows = Windows(clock)
    rules = [Rule("requests", 10**9, 86_400)]
    for _ in range(20_000):
        windows.take("a", rules)
        clock.now += 7.77
    (window,) = windows._windows.values()
    assert len(window.entries) <= MAX_ENTRIES + 1
    assert window.total == pytest.approx(86_400 / 7.77, rel=0.01)


def test_memory_is_bounded_by_clients(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WINDOWS", 100)
    windows = Windows(clock)
    for number in range(1000):
        windows.take(str(number), TEN)
        assert windows.num_windows <= 101
    assert windows.take("999", TEN).states[0].remaining == 8, "the newest are remembered"
    clock.now += 61
    for number in range(100):
        windows.take(str(number), TEN)
    assert windows.num_windows <= 101


def test_clients_that_went_are_forgotten(clock: Clock) -> None:
    windows = Windows(clock)
    for number in range(1000):
        windows.take(str(number), TEN)
    clock.now += 61
    for _ in range(10):
        windows.take("a", TEN)
    for number in range(600):
        windows.take(str(number % 3), TEN)
    assert windows.num_windows < 10


STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "hold", "settle", "settle all"]), st.integers(1, 60), st.floats(0, 40)),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.sampled_from([100, 5000]))
def test_never_more_than_the_limit_within_any_period(steps: list[tuple[str, int, float]], limit: int) -> None:
    """Against the plain definition: everything used within the last period, texts in the air included in full."""
    clock = Clock()
    windows = Windows(clock)
    rules = [Rule("tokens", limit, 60)]
    scale = limit // 100
    used: list[tuple[float, int]] = []
    held: dict[str, int] = {}
    for number, (what, amount, pause) in enumerate(steps):
        clock.now += pause
        amount *= scale
        counted = sum(n for at, n in used if clock.now - at < 60) + sum(held.values())
        if what in ("take", "hold"):
            hold = str(number) if what == "hold" else ""
            taken = windows.take("a", rules, amount, hold=hold, hold_s=10_000)
            if limit <= MAX_ENTRIES:
                assert taken.admitted == (counted + amount <= limit)
            if taken.admitted:
                assert counted + amount <= limit
                if hold:
                    held[hold] = amount
                else:
                    used.append((clock.now, amount))
        elif held:
            hold, most = held.popitem()
            came_to = most if what == "settle all" else most // 3
            windows.settle("a", rules, hold, came_to)
            used.append((clock.now, came_to))
