import os
import signal
import subprocess
import sys

import trio

from mesh.runtime.signals import watch_signals

_PROGRAM = """
import trio
from mesh.runtime.signals import watch_signals
async def main():
    async with trio.open_nursery() as nursery:
        stop = await nursery.start(watch_signals)
        print("up", flush=True)
        await stop.wait()
        print("stopping", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def test_sigterm_sets_the_event():
    async def main():
        async with trio.open_nursery() as nursery:
            stop = await nursery.start(watch_signals)
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            with trio.fail_after(10):
                await stop.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_second_sigint_ends_the_process_at_once_with_status_0():
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "up\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "stopping\n"
            process.send_signal(signal.SIGTERM)  # asks for what is going on already
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        finally:
            process.kill()
