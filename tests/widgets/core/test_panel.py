"""The error of a panel after several uses of its buttons."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from widgets.core.panel import Panel


class Buttons(Panel):
    """One button that raises at once, one whose request fails, and one that succeeds."""

    def refuse(self) -> None:
        raise ValueError("this is refused")

    def fail(self) -> Future[Any]:
        def begin() -> None:
            raise ValueError("this request fails")

        return self.after(begin)

    def succeed(self) -> None:
        pass


def test_the_error_of_a_request_stays_after_the_error_of_another_button() -> None:
    panel = Buttons()
    panel._pressed("refuse")
    assert "this is refused" in panel.error
    panel._pressed("fail")
    assert "this request fails" in panel.error
    panel._pressed("refuse")
    panel._pressed("succeed")
    assert panel.error == ""
    panel.close()
