from __future__ import annotations

from mesh.model.l7.destination import OutlierDetection
from waypoint_py.upstream.outlier import Health, LocalOutcome, OutlierDetector


def detector(**fields: object) -> tuple[OutlierDetector, list[Health]]:
    config = OutlierDetection(**{"max_ejection_percent": 100, **fields})
    return OutlierDetector(config), [Health() for _ in range(4)]


def test_five_5xx_in_a_row_eject_and_four_do_not() -> None:
    judge, all_of_them = detector()
    ejected = [judge.answered(all_of_them[0], 500, all_of_them, 0.0) for _ in range(5)]
    assert ejected == [False, False, False, False, True]
    assert all_of_them[0].because == "5 answers in a row were 5xx"


def test_a_good_answer_begins_the_count_anew() -> None:
    judge, all_of_them = detector(consecutive_5xx=2)
    for status in (500, 200, 500, 404):
        assert not judge.answered(all_of_them[0], status, all_of_them, 0.0)


def test_gateway_errors_are_counted_by_themselves() -> None:
    judge, all_of_them = detector(consecutive_5xx=0, consecutive_gateway_errors=2)
    assert [judge.answered(all_of_them[0], status, all_of_them, 0.0) for status in (502, 500, 503, 504)] == [False, False, False, True]


def test_one_endpoint_may_always_be_ejected_and_no_more_than_the_percentage() -> None:
    judge, all_of_them = detector(consecutive_5xx=1, max_ejection_percent=10)
    assert judge.answered(all_of_them[0], 500, all_of_them, 0.0)
    assert not judge.answered(all_of_them[1], 500, all_of_them, 0.0)


def test_an_ejection_lasts_its_time_and_the_next_one_twice_as_long() -> None:
    judge, all_of_them = detector(consecutive_5xx=1, interval=1.0, base_ejection_time=10.0)
    judge.sweep(all_of_them, 0.0)
    judge.answered(all_of_them[0], 500, all_of_them, 0.5)
    assert not judge.sweep(all_of_them, 9.0)
    assert judge.sweep(all_of_them, 11.0)
    assert all_of_them[0].ejected_at is None
    judge.answered(all_of_them[0], 500, all_of_them, 11.5)
    assert not judge.sweep(all_of_them, 30.0)
    assert judge.sweep(all_of_them, 32.0)


def test_good_conduct_makes_the_next_ejection_short_again() -> None:
    judge, all_of_them = detector(consecutive_5xx=1, interval=1.0, base_ejection_time=10.0)
    judge.sweep(all_of_them, 0.0)
    judge.answered(all_of_them[0], 500, all_of_them, 0.0)
    assert judge.sweep(all_of_them, 10.0)
    judge.sweep(all_of_them, 11.0)
    assert all_of_them[0].ejections == 0


def test_failed_connections_count_as_503_unless_they_are_told_apart() -> None:
    judge, all_of_them = detector(consecutive_5xx=0, consecutive_gateway_errors=2)
    results = [judge.happened_here(all_of_them[0], LocalOutcome.FAILED, all_of_them, 0.0) for _ in range(2)]
    assert results == [False, True]
    judge, all_of_them = detector(split_local_origin=True, consecutive_5xx=1, consecutive_local_origin_failures=3)
    results = [judge.happened_here(all_of_them[0], LocalOutcome.FAILED, all_of_them, 0.0) for _ in range(2)]
    judge.happened_here(all_of_them[0], LocalOutcome.CONNECTED, all_of_them, 0.0)
    results += [judge.happened_here(all_of_them[0], LocalOutcome.FAILED, all_of_them, 0.0) for _ in range(3)]
    assert results == [False, False, False, False, True]
