import pytest

from mesh.testing.hbone import StoppedClock
from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.hbone.patience import CAPACITY, REFILL_PER_SECOND, Patience


def test_points_run_out_and_grow_back_with_time() -> None:
    clock = StoppedClock()
    patience = Patience(clock)
    for _ in range(int(CAPACITY)):
        patience.spend(1, "PING")
    clock.seconds += 1.0
    for _ in range(int(REFILL_PER_SECOND)):
        patience.spend(1, "PING")
    with pytest.raises(RemoteProtocolError, match="too much of PING") as caught:
        patience.spend(1, "PING")
    assert caught.value.code == ErrorCode.ENHANCE_YOUR_CALM


def test_a_long_rest_gives_no_more_than_the_bucket_holds() -> None:
    clock = StoppedClock()
    patience = Patience(clock)
    clock.seconds += 1e6
    with pytest.raises(RemoteProtocolError):
        patience.spend(int(CAPACITY) + 1, "RST_STREAM")
