import pytest

from client.pace import Pace


def test_back_off_doubles_up_to_its_limit_and_starts_again():
    pace = Pace(1.0, 15.0)
    assert [pace.next() for _ in range(6)] == [1, 2, 4, 8, 15, 15]
    pace.reset()
    assert pace.next() == 1


def test_slow_growth_is_two_percent_of_the_time_waited():
    pace, waited = Pace(0.2, 3.0, growth=1.02), 0.0
    for _ in range(100):
        pause = pace.next()
        assert pause == pytest.approx(0.2 + 0.02 * waited)
        waited += pause
    assert 60 < waited < 65  # (1.02**100 - 1) * 0.2 / 0.02 = 62.4
