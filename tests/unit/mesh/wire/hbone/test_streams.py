import itertools

import pytest

from mesh.wire.hbone.streams import TRANSITIONS, Direction, Signal, Stream

LEGAL = {
    (Direction.SILENT, Signal.HEADERS): Direction.OPEN,
    (Direction.OPEN, Signal.DATA): Direction.OPEN,
    (Direction.OPEN, Signal.END): Direction.ENDED,
}


@pytest.mark.parametrize(("state", "signal"), list(itertools.product(Direction, Signal)))
def test_only_the_legal_steps_are_taken_in_either_direction(state: Direction, signal: Signal) -> None:
    stream = Stream(1, 10, 10)
    stream.receiving = stream.sending = state
    following = LEGAL.get((state, signal))
    assert stream.received(signal) is (following is not None)
    assert stream.receiving is (following or state)
    assert stream.sending is state
    assert stream.sent(signal) is (following is not None)
    assert stream.sending is (following or state)


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(Direction)


def test_a_stream_is_over_when_both_directions_ended() -> None:
    stream = Stream(1, 10, 10)
    for receiving, sending in itertools.product(Direction, Direction):
        stream.receiving, stream.sending = receiving, sending
        assert stream.is_over is (receiving is sending is Direction.ENDED)
