"""The server's extension: enabled in the environment, and it leaves another's connection alone."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection

from widgets import server


class Another(ZMQChannelsWebsocketConnection):
    pass


def loaded(connection: type) -> type:
    settings = {server.CONNECTION: connection}
    server._load_jupyter_server_extension(SimpleNamespace(web_app=SimpleNamespace(settings=settings)))
    return settings[server.CONNECTION]


def test_it_takes_the_place_of_the_servers_own_connection_alone() -> None:
    assert loaded(ZMQChannelsWebsocketConnection) is server.PromptConnection
    assert loaded(Another) is Another


def test_setup_has_enabled_it() -> None:
    assert json.loads(server.CONFIG.read_text()) == {"ServerApp": {"jpserver_extensions": {"widgets.server": True}}}
    listed = subprocess.run(
        [sys.executable, "-m", "jupyter", "server", "extension", "list"], capture_output=True, text=True
    )
    told = listed.stdout + listed.stderr
    assert "widgets.server" in told
    assert "Validation failed" not in told
