"""Programs that several threads start, started one after the other."""

import functools
import threading
from collections.abc import Callable

_LOCK = threading.Lock()


def in_order[**P, R](program: Callable[P, R]) -> Callable[P, R]:
    """`program`, a jitted function, started on all devices before another thread starts one: were
    two started in different orders on two devices, their collectives would wait for each other for
    ever. It is not waited for.
    """

    @functools.wraps(program)
    def started(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            return program(*args, **kwargs)

    return started
