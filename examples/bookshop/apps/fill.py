"""Fills the database, once."""

import time

import store

while True:
    try:
        store.ask(*(f"PUT book-{number} Volume {number}" for number in range(100)))
        break
    except OSError as exc:  # the database is not up yet, or has no name yet
        print(exc, flush=True)
        time.sleep(0.5)
