"""The base of panels whose pending requests can be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from refine_lab.explore.client import Worker
from refine_lab.explore.futures import RequestCancelled
from widgets.core.panel import Panel


class CancellingPanel(Panel):
    """A panel with the button `cancel_button`, which is enabled while requests are pending and cancels them."""

    def __init__(self) -> None:
        self._cancelling = threading.RLock()
        self._cancellations = 0
        self._requests: dict[Future[Any], Worker] = {}
        super().__init__()
        self.cancel_button = self.button("cancel", "Cancel what is pending; what is shown stays")
        self.cancel_button.disabled = True
        self.cancel_button.layout.width = "auto"

    def cancel(self) -> None:
        """Cancels the pending requests: their futures return None, and nothing is shown of them."""
        self._end_requests()
        self.report("Cancelled.")

    def close(self) -> None:
        """Ends the pending requests, also of panels inside, so that the worker is free for others; closes the panel."""
        if hasattr(self, "_requests"):  # not if the constructor failed
            for panel in (self, *self.children):
                if isinstance(panel, CancellingPanel):
                    panel._end_requests()
        super().close()

    def _end_requests(self) -> None:
        with self._cancelling:
            self._cancellations += 1
            for asked, worker in [*self._requests.items()]:
                worker.cancel(asked)

    def request(self, worker: Worker, method: str, **arguments: Any) -> Future[Any]:
        """Requests a method of `Session`, which `cancel` then ends."""
        with self._cancelling:
            asked = worker.submit(method, **arguments)
            self._requests[asked] = worker
        asked.add_done_callback(lambda _: self._requests.pop(asked, None))
        return asked

    def after(self, begin: Callable[[], Any], *then: Callable[[Any], Any]) -> Future[Any]:
        """Calls functions one after the other, as `Panel.after`, until `cancel` is called."""
        began = self._cancellations

        def unless_cancelled(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*results: Any) -> Any:
                with self._cancelling:  # so that `cancel` comes before or after
                    if began != self._cancellations:
                        raise RequestCancelled
                    return function(*results)

            return call

        return super().after(unless_cancelled(begin), *map(unless_cancelled, then))

    def busy_changed(self, busy: bool) -> None:
        self.cancel_button.disabled = not busy
        super().busy_changed(busy)
