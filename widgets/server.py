"""A Jupyter server extension that sends kernel messages to the page without delay.

Without it, a second small message waits until the page acknowledges the first, for about 40 ms of the 60 ms that a
click to Python and back takes (Nagle's algorithm with delayed acknowledgements; tornado's `set_nodelay`). `python -m
widgets.server` enables it in an environment, which `make setup` does. The rest of the server is unchanged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection

CONNECTION = "kernel_websocket_connection_class"
CONFIG = Path(sys.prefix) / "etc" / "jupyter" / "jupyter_server_config.d" / "refine_lab.json"


class PromptConnection(ZMQChannelsWebsocketConnection):
    """A kernel's connection to a page without send delays."""

    def connect(self) -> Any:
        self.websocket_handler.set_nodelay(True)
        return super().connect()


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "widgets.server"}]


def _load_jupyter_server_extension(app: Any) -> None:
    settings = app.web_app.settings
    if settings.get(CONNECTION) is ZMQChannelsWebsocketConnection:  # one that somebody else put there stays
        settings[CONNECTION] = PromptConnection


if __name__ == "__main__":
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.write_text(
        json.dumps({"ServerApp": {"jpserver_extensions": {"widgets.server": True}}}) + "\n", encoding="utf-8"
    )
