"""SIGINT, SIGTERM and SIGHUP end the process soon, whatever it waits for, and let it leave its files whole."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

GRACE_S = 0.5  # for leaving in order; torchrun and the other ranks wait for it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The signal came. Raised in the main thread as soon as it runs Python; the argument is the signal."""

    @property
    def signal(self) -> signal.Signals:
        return self.args[0]


def stop_on_signals() -> None:
    """From now on raise Stopped in the main thread, and end the process after GRACE_S seconds in any case.

    A handler in Python waits until the main thread leaves torch's C++, where it may wait for another rank. So the C
    handler also writes to a socket, and a thread reads it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells leave it for what shall go on
            signal.signal(number, _raise)
    threading.Thread(target=_end, args=(reader, writer), name="stop", daemon=True).start()


def _raise(number: int, frame: object) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # leaving in order happens once
    raise Stopped(signal.Signals(number))


def _end(reader: socket.socket, writer: socket.socket) -> None:
    """`writer` is an argument to keep it open."""
    number = reader.recv(1)[0]
    time.sleep(GRACE_S)
    os._exit(128 + number)
