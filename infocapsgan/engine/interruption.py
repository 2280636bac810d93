"""Signals that ask a program to end, noted instead of obeyed."""

import signal
import threading
from typing import Any


class Interruption:
    """Counts SIGINT, SIGTERM and SIGHUP in `came`; after `most` of them they act as they did before.

    Only the main thread can be told of signals: in another one nothing is noted. A SIGHUP that is ignored
    already, as under nohup, stays so.
    """

    def __init__(self, most: int = 1) -> None:
        self.most, self.came = most, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.came += 1
        if self.came >= self.most:
            self.__exit__()
