"""The hub: names and their parts, and the real download from a small server that answers as the hub does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch

from refine_lab.models import hub, load_model
from refine_lab.models.hub import HubName, locate, resolve
from refine_lab.models.loading import load_tokenizer
from refine_lab.text import quote
from refine_lab.validation import ConfigError
from tests.factories.loading import save_small_model
from tests.support.refusals import naming

MAIN, OTHER = "a" * 40, "b" * 40
REVISIONS = {"main": MAIN, "v2": OTHER, "refs/pr/1": OTHER}


class FakeHub(ThreadingHTTPServer):
    """Serves `folder/<commit>/...` as the repository org/small; remembers which files it gave."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.given, self.answer, self.requests = folder, [], None, 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.answer is not None:
            return self._send(*self.server.answer)
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/org/small"):
            return self._about(path.removeprefix("/api/models/org/small").strip("/"))
        if path.startswith("/org/small/resolve/"):
            return self._file(path.removeprefix("/org/small/resolve/"))
        return self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _about(self, rest: str) -> None:
        if rest.startswith("tree/"):
            root = self.server.folder / rest.split("/")[1]
            files = sorted(path for path in root.rglob("*") if path.is_file())
            listed = [
                {"type": "file", "path": str(p.relative_to(root)), "size": p.stat().st_size, "oid": _etag(p)}
                for p in files
            ]
            return self._send(200, {}, json.dumps(listed).encode())
        name = rest.removeprefix("revision/") or "main"
        commit = REVISIONS.get(name, name if name in (MAIN, OTHER) else None)
        if commit is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        root = self.server.folder / commit
        files = [{"rfilename": str(path.relative_to(root))} for path in sorted(root.rglob("*")) if path.is_file()]
        return self._send(200, {}, json.dumps({"id": "org/small", "sha": commit, "siblings": files}).encode())

    def _file(self, rest: str) -> None:
        commit, _, file = rest.partition("/")
        path = self.server.folder / commit / file
        if not path.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.given.append(file)
        return self._send(200, {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit}, path.read_bytes())

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"{}") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return f"{abs(hash((str(path), path.stat().st_size))):040x}"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Two commits: a model at the root, the same in a folder without a tokenizer, one more below, pickles, code, the rest."""
    root = tmp_path_factory.mktemp("repository")
    for commit, seed in ((MAIN, 0), (OTHER, 1)):
        save_small_model(root / commit, seed)
        for file in (
            "pytorch_model.bin",
            "optimizer.bin",
            "modeling_small.py",
            "README.md",
            "consolidated.safetensors",
        ):
            (root / commit / file).write_bytes(b"not wanted")
        below = root / commit / "sizes" / "deep"
        save_small_model(below, seed + 2)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (below / file).unlink()
        save_small_model(below / "checkpoint-5", seed + 4)
        (root / commit / "sizes" / "model.safetensors.index.json").write_text("not wanted")
    return root


@pytest.fixture
def server(repository, tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """The hub and an empty cache."""
    served = FakeHub(repository)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    point_at(monkeypatch, served.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    served.shutdown()
    served.server_close()
    thread.join()
    huggingface_hub.close_session()


def point_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT does where it is set before the start."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/repo", ("org/repo", "", None)),
        ("fla-hub/delta_net-1.3B-100B", ("fla-hub/delta_net-1.3B-100B", "", None)),
        ("org/repo:760M", ("org/repo", "760M", None)),
        ("org/repo:a/b/", ("org/repo", "a/b", None)),
        ("org/repo@v2", ("org/repo", "", "v2")),
        ("org/repo:760M@refs/pr/1", ("org/repo", "760M", "refs/pr/1")),
    ],
)
def test_a_hub_name_has_parts(name, parts):
    assert HubName.parse(name) == HubName(*parts)


@pytest.mark.parametrize(
    "name",
    (
        "repo",
        "a/b/c",
        "./a/b",
        "/a/b",
        "~/b",
        "../b",
        "a/..",
        "org/repo:",
        "org/repo@",
        "org/repo@v@w",
        "org/repo:../x",
        "org/repo:*",
        "",
    ),
)
def test_other_names_are_none_of_the_hubs(name):
    assert HubName.parse(name) is None


def test_a_folder_is_found_before_the_hub_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    assert resolve("org/repo") == Path("org/repo")
    with naming(ValueError, "'v2'", "'org/repo'"):
        locate("org/repo", "v2")
    with naming(ValueError, "'v1'", "'a/b@v1'", "'v2'"):
        locate("a/b@v1", "v2")


def test_a_path_is_a_path_and_no_shipped_model(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(save_small_model(tmp_path))
    assert (resolve("."), resolve("./")) == (Path(), Path())
    monkeypatch.chdir(tmp_path / "below")
    assert resolve("..") == Path("..")
    assert resolve("tiny-deltanet") == hub.SHIPPED / "tiny-deltanet"


@pytest.mark.parametrize("name", ("~nobody-of-this-name/m", "x" * 300, "a\0b"))
def test_what_no_file_system_holds_is_not_found(name):
    with naming(FileNotFoundError, quote(name), "org/repo:subfolder@revision"):
        load_model(name)


def test_only_numbered_checkpoints_of_a_run_are_taken(tmp_path):
    run = tmp_path
    (run / "config.json").write_text('{"format_version": 1}')
    with naming(FileNotFoundError, run, "checkpoint"):
        resolve(str(run))
    for name in ("step-9", "step-10", "step-old", ".step-11.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert resolve(str(run)) == run / "checkpoints" / "step-10"


def test_an_unknown_model_names_where_it_was_looked_for():
    with naming(FileNotFoundError, "'tiny-deltanot'"):
        load_model("tiny-deltanot")


def test_a_model_with_a_folder_of_checkpoints_is_no_run(tmp_path):
    folder = save_small_model(tmp_path / "model", 1)
    save_small_model(folder / "checkpoints" / "step-5", 2)
    assert resolve(str(folder)) == folder
    (folder / "config.json").write_text('{"format_version": 1}')
    assert resolve(str(folder)) == folder / "checkpoints" / "step-5"


# -- the download ------------------------------------------------------------------------------------------------------


def weight(folder: Path) -> torch.Tensor:
    return load_model(folder, device="cpu")[0].lm_head.weight


@pytest.mark.parametrize(
    ("name", "revision", "place"),
    [
        ("org/small", None, f"{MAIN}"),
        ("org/small@v2", None, f"{OTHER}"),
        ("org/small", "refs/pr/1", f"{OTHER}"),
        (f"org/small@{OTHER}", None, f"{OTHER}"),
        ("org/small:sizes/deep/checkpoint-5@v2", None, f"{OTHER}/sizes/deep/checkpoint-5"),
    ],
)
def test_a_model_is_downloaded_with_what_it_needs_and_no_more(server, repository, name, revision, place):
    policy, tokenizer = load_model(name, device="cpu", revision=revision)
    assert torch.equal(policy.lm_head.weight, weight(repository / place))
    assert tokenizer.eos_token == "<|endoftext|>"
    folder = place[41:] and place[41:] + "/"
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(server.given) == sorted(folder + file for file in small | {"model.safetensors"})
    server.given.clear()
    load_model(name, device="cpu", revision=revision)
    assert not server.given


def test_a_subfolder_takes_the_repositorys_tokenizer(server, repository):
    policy, tokenizer = load_model("org/small:sizes/deep", device="cpu")
    config = json.loads((repository / MAIN / "sizes/deep/config.json").read_text())
    assert config["model_type"] == policy.config.model_type
    assert tokenizer("the cat").input_ids == load_model(repository / MAIN, device="cpu")[1]("the cat").input_ids
    below = {f"sizes/deep/{file}" for file in ("config.json", "generation_config.json", "model.safetensors")}
    assert set(server.given) == below | {"tokenizer.json", "tokenizer_config.json"}


def test_all_files_are_of_one_commit(server, repository, monkeypatch):
    place = locate("org/small")
    monkeypatch.setitem(REVISIONS, "main", OTHER)  # a push in between
    place.fetch(["model.safetensors"])
    expected = (repository / MAIN / "model.safetensors").read_bytes()
    assert (place.folder / "model.safetensors").read_bytes() == expected
    assert locate("org/small").folder.name == OTHER


def test_drawn_weights_are_not_downloaded(server):
    load_model("new:org/small", device="cpu")
    assert not [file for file in server.given if "safetensors" in file]


def test_a_foreign_family_is_refused_before_its_weights_are_downloaded(server, repository, tmp_path):
    server.folder = tmp_path / "other"
    (server.folder / MAIN).mkdir(parents=True)
    (server.folder / MAIN / "config.json").write_text('{"model_type": "bert"}')
    (server.folder / MAIN / "model.safetensors").write_bytes(b"x" * 1000)
    with naming(ValueError, "config.json", "model_type 'bert'"):
        load_model("org/small")
    assert server.given == ["config.json"]


def test_shards_are_downloaded_by_the_index(server, repository, tmp_path):
    policy, tokenizer = load_model(repository / MAIN, device="cpu")
    folder = server.folder = tmp_path / "sharded"
    for part in (folder / MAIN, tokenizer):
        policy.save_pretrained(part, max_shard_size="20KB") if part is not tokenizer else part.save_pretrained(
            folder / MAIN
        )
    (folder / MAIN / "consolidated.safetensors").write_bytes(b"not wanted")
    shards = {path.name for path in (folder / MAIN).glob("model-*.safetensors")}
    assert len(shards) > 2
    assert torch.equal(load_model("org/small", device="cpu")[0].lm_head.weight, policy.lm_head.weight)
    assert {file for file in server.given if file.endswith(".safetensors")} == shards


def test_pickles_on_the_hub_are_named_and_stay_there(server, repository, tmp_path):
    policy, tokenizer = load_model(repository / MAIN, device="cpu")
    folder = server.folder = tmp_path / "pickled"
    policy.config.save_pretrained(folder / MAIN)
    tokenizer.save_pretrained(folder / MAIN)
    torch.save(policy.state_dict(), folder / MAIN / "pytorch_model.bin")
    with naming(ValueError, "pytorch_model.bin", "allow_pickle=True"):
        load_model("org/small")
    assert "pytorch_model.bin" not in server.given
    server.answer = (503, {})
    with naming(FileNotFoundError, "503 Service Unavailable"):
        load_model("org/small")
    server.answer = None
    again, _ = load_model("org/small", device="cpu", allow_pickle=True)
    assert torch.equal(again.lm_head.weight, policy.lm_head.weight)


@pytest.mark.parametrize("named", ("pytorch_model.bin", "sub/model-1.safetensors", "*.safetensors"))
def test_an_index_on_the_hub_names_safetensors_beside_it(server, repository, tmp_path, named):
    policy, tokenizer = load_model(repository / MAIN, device="cpu")
    server.folder = tmp_path / "indexed"
    folder = server.folder / MAIN
    policy.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(policy.state_dict(), folder / "pytorch_model.bin")
    save_small_model(folder / "sub").joinpath("model.safetensors").rename(folder / "sub" / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(policy.state_dict(), named)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with naming(ConfigError, "index.json", repr(named)):
        load_model("org/small")
    assert not [file for file in server.given if file.endswith((".bin", ".safetensors"))]


def test_what_the_cache_holds_is_loaded_without_the_hub(server, repository, monkeypatch):
    expected = load_model("org/small", device="cpu")[0].lm_head.weight
    by_revision = load_model("org/small:sizes/deep@v2", device="cpu")[0].lm_head.weight
    server.given.clear()
    server.answer = (503, {})
    assert torch.equal(load_model("org/small", device="cpu")[0].lm_head.weight, expected)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_model("org/small", device="cpu")[0].lm_head.weight, expected)
    assert torch.equal(load_model("org/small:sizes/deep@v2", device="cpu")[0].lm_head.weight, by_revision)
    assert not server.given


# -- what is missing, and why ------------------------------------------------------------------------------------------


def refusal(name: str, cache: Path, **settings) -> str:
    """The one sentence of a name that is not found, without what all of them begin with; quickly."""
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        load_model(name, **settings)
    assert time.monotonic() - begun < 5
    text = str(caught.value)
    folder, shipped = Path(name).absolute(), ", ".join(sorted(path.name for path in hub.SHIPPED.glob("*/")))
    known = f"there is no model {name!r}: not one of the shipped models ({shipped}), no run or folder at {folder}, "
    where = f"not complete in the cache {cache}, and {huggingface_hub.constants.ENDPOINT} "
    assert text.startswith(known + where), text
    assert "\n" not in text
    return text.removeprefix(known + where)


def test_what_the_hub_does_not_have_is_told_with_its_cause(server, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert refusal("org/none", cache) == "has no repository org/none, or it is private and requires a login"
    assert refusal("org/small@v9", cache) == "has no revision 'v9' of org/small"
    server.answer = (403, {"X-Error-Code": "GatedRepo"})
    assert refusal("org/small", cache) == ("requires access to org/small: request it there, and log in")
    server.answer = (401, {})
    assert refusal("org/small", cache) == "answers 401 Unauthorized"
    server.answer = (503, {})
    assert refusal("org/small", cache) == "answers 503 Service Unavailable"
    for page in (b"<html>log in</html>", b"[]", b"{}"):
        server.answer = (200, {}, page)
        answer = "cannot be reached (the response does not come from a Hub; it may be a network's login page)"
        assert refusal("org/small", cache) == answer
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("org/small", cache) == "is not queried, since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert refusal("org/a--b", cache).startswith("does not accept this name (")


def test_a_subfolder_without_a_model_is_told(server):
    with naming(FileNotFoundError, "org/small", "'sizes'", "config.json"):
        load_model("org/small:sizes")


def test_a_hub_out_of_reach_is_told_quickly(server, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 0.5)
        point_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert refusal("org/small", tmp_path / "cache") == "cannot be reached (timed out)"
    huggingface_hub.close_session()
    assert "cannot be reached (" in refusal("org/small", tmp_path / "cache")  # nobody listens any more


def test_half_a_download_without_the_hub_is_told(server, tmp_path, monkeypatch):
    load_model("new:org/small", device="cpu")  # all but the weights
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with naming(FileNotFoundError, "cache", "HF_HUB_OFFLINE"):
        load_model("org/small")


@pytest.mark.slow
def test_the_environments_endpoint_and_cache_are_taken(server, repository, tmp_path):
    """As a user sets them: HF_ENDPOINT and HF_HOME before the start."""
    code = (
        "from refine_lab import load_model; print(load_model('org/small:sizes/deep@v2')[0].lm_head.weight.sum().item())"
    )
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    policy, _ = load_model("org/small:sizes/deep@v2", device="cpu")
    assert float(done.stdout) == pytest.approx(policy.lm_head.weight.sum().item(), rel=1e-6)
    assert (tmp_path / "home" / "hub" / "models--org--small" / "snapshots" / OTHER).is_dir()


def test_a_model_in_the_cache_alone_asks_the_hub_nothing(server):
    with pytest.raises(FileNotFoundError, match="not complete in the cache"):
        load_tokenizer("org/small", cached=True)
    assert server.requests == 0
    expected = load_tokenizer("org/small").get_vocab()
    requests = server.requests
    assert requests > 0
    assert load_tokenizer("org/small", cached=True).get_vocab() == expected
    assert server.requests == requests
