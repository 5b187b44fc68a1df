"""The trustless gateway's answers, and a fetch through it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from omnistore import dagcbor
from omnistore.block import Block
from omnistore.cid import CID
from omnistore.errors import BlockMissing, InputError, MalformedCID, NoProviders
from omnistore.http.gateway import CAR_TYPE, NOTHING, RAW_TYPE, gateway
from omnistore.http.message import App, Request, Response
from omnistore.http.server import addresses, open_tcp, serve_http
from omnistore.keys import PrivateKey
from omnistore.store.memory import MemoryStore
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.client import FetchOptions, FetchReport, Offline, fetch_model
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.window import SessionLimits

KEY = PrivateKey(bytes(32))
Model = tuple[Path, MemoryStore, CID]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_model(3, width=128).build())
    return path, *seeded(path, KEY)


def ask(
    store: MemoryStore, path: str, accept: str = "", *, method: str = "GET", known: str = "", **query: str
) -> tuple[Response, bytes]:
    headers = {"accept": accept, "if-none-match": known}
    query = {name.replace("_", "-"): value for name, value in query.items()}

    async def main() -> tuple[Response, bytes]:
        response = await gateway(store, Pacer(None))(Request(method, path, query, headers))
        body = response.body
        return response, b"".join([bytes(p) async for p in body]) if isinstance(
            body, AsyncIterator
        ) else bytes(body)

    return trio.run(main)


def read_car(data: bytes) -> tuple[list[CID], list[Block]]:
    """Take a CARv1 apart, verifying it."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    size, at = number(0)
    header = dagcbor.decode_untrusted(data[at : at + size], limit=1000)
    assert isinstance(header, dict) and header["version"] == 1
    roots = header["roots"]
    at += size
    blocks = []
    while at < len(data):
        size, at = number(at)
        cid = CID.from_bytes_untrusted(data[at : at + 36])
        blocks.append(Block.verify_untrusted(cid, data[at + 36 : at + size]))
        at += size
    assert isinstance(roots, list) and all(isinstance(root, CID) for root in roots)
    return list(roots), blocks  # type: ignore[arg-type]  # checked on the line above


@pytest.mark.parametrize("by", ["query", "accept", "both"])
def test_a_raw_block(model: Model, by: str) -> None:
    _, seed, cid = model
    accept = f"text/html, {RAW_TYPE}; q=0.9" if by != "query" else "*/*"
    response, body = ask(seed, f"/ipfs/{cid}", accept, **({} if by == "accept" else {"format": "raw"}))
    assert (response.status, response.content_type) == (200, RAW_TYPE)
    assert body == bytes(seed.read(cid).data)
    headers = dict(response.headers)
    assert headers["Etag"] == f'"{cid}.raw"'
    assert "immutable" in headers["Cache-Control"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert f"{cid}.bin" in headers["Content-Disposition"]


def test_what_is_known_already_is_not_sent_again(model: Model) -> None:
    _, seed, cid = model
    response, body = ask(seed, f"/ipfs/{cid}", known=f'"x", W/"{cid}.raw"', format="raw")
    assert (response.status, body) == (304, b"")


def test_a_gateway_is_recognised_by_nothing(model: Model) -> None:
    response, body = ask(model[1], f"/ipfs/{NOTHING}", format="raw")
    assert (response.status, response.content_type, body) == (200, RAW_TYPE, b"")


@pytest.mark.parametrize("scope", ["all", "entity", "block"])
def test_a_car_of_a_part(model: Model, scope: str) -> None:
    _, seed, cid = model
    ref = seed.model(cid).manifest.parts[-1]
    response, body = ask(seed, f"/ipfs/{ref.cid}", CAR_TYPE, dag_scope=scope)
    assert response.content_type == f"{CAR_TYPE}; version=1; order=dfs; dups=n"
    assert dict(response.headers)["Etag"].startswith('W/"')
    roots, blocks = read_car(body)
    assert roots == [ref.cid] and blocks[0].cid == ref.cid
    links = dict.fromkeys(block for block, _ in seed.model(cid).parts[ref.key].links())
    assert [block.cid for block in blocks[1:]] == (list(links) if scope == "all" else [])


def test_a_car_of_a_whole_model(model: Model) -> None:
    _, seed, cid = model
    _, body = ask(seed, f"/ipfs/{cid}", format="car")
    found = {block.cid for block in read_car(body)[1]}
    known = seed.model(cid)
    assert {cid, known.manifest_cid} < found
    assert all(block in found for part in known.parts.values() for block, _ in part.links())


def test_a_car_that_would_lack_something_is_not_begun(model: Model) -> None:
    path, seed, cid = model
    some, _ = seeded(path, KEY, [seed.model(cid).manifest.parts[0].key])
    with pytest.raises(BlockMissing, match="are not held"):
        ask(some, f"/ipfs/{cid}", format="car")


@pytest.mark.parametrize(
    ("path", "query", "accept", "status"),
    [
        ("/", {"format": "raw"}, "", 404),
        ("/ipns/x", {"format": "raw"}, "", 404),
        ("/ipfs/{}", {}, "", 406),
        ("/ipfs/{}", {}, "text/html,*/*", 406),
        ("/ipfs/{}", {"format": "tar"}, RAW_TYPE, 406),
        ("/ipfs/{}", {}, f"{CAR_TYPE}; version=2", 406),
    ],
)
def test_what_is_not_served(model: Model, path: str, query: dict[str, str], accept: str, status: int) -> None:
    assert ask(model[1], path.format(model[2]), accept, **query)[0].status == status


def test_nothing_can_be_written(model: Model) -> None:
    response, _ = ask(model[1], f"/ipfs/{model[2]}", method="PUT", format="raw")
    assert response.status == 405


@pytest.mark.parametrize(
    ("path", "error"),
    [("/ipfs/", MalformedCID), ("/ipfs/Qm", MalformedCID), ("/ipfs/{}/part", MalformedCID)],
)
def test_no_cid_and_no_path_below_one(model: Model, path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        ask(model[1], path.format(model[2]), format="raw")
    with pytest.raises(BlockMissing):
        ask(MemoryStore(), f"/ipfs/{model[2]}", format="raw")
    with pytest.raises(InputError, match="dag-scope"):
        ask(model[1], f"/ipfs/{model[2]}", format="car", dag_scope="some")


# --- fetching from one ----------------------------------------------------------------------


def fetch_through(app: App, cid: CID, output: Path) -> tuple[FetchReport, str]:
    async def main() -> tuple[FetchReport, str]:
        listeners = await open_tcp("127.0.0.1", 0)
        url = f"http://{addresses(listeners)[0]}"
        failure: NoProviders | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve_http, app, listeners))
            options = FetchOptions(gateways=[url], output=output, limits=SessionLimits(provider_timeout=0.5))
            try:
                with trio.fail_after(30):
                    report = await fetch_model(Offline(), None, MemoryStore(), cid, options)
            except NoProviders as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure:
            raise failure
        return report, url

    return trio.run(main)


def test_a_gateway_alone_is_enough(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    report, url = fetch_through(gateway(seed, Pacer(None)), cid, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    assert list(report.peers) == [f"{url} (gateway)"]


def test_a_gateway_that_has_the_nodes_only(model: Model, tmp_path: Path) -> None:
    path, _, cid = model
    nodes, _ = seeded(path, KEY, [])
    with pytest.raises(NoProviders, match="holds what is needed"):
        fetch_through(gateway(nodes, Pacer(None)), cid, tmp_path / "out.gguf")


@pytest.mark.parametrize("fault", ["lies", "large", "empty", "html"])
def test_a_bad_gateway_is_dropped_and_named(model: Model, tmp_path: Path, fault: str) -> None:
    _, seed, cid = model
    right = gateway(seed, Pacer(None))

    async def app(request: Request) -> Response:
        response = await right(request)
        if NOTHING in request.path:
            return response
        body = {
            "lies": b"something else",
            "large": bytes(3 << 20),
            "empty": b"",
            "html": b"<html>",
        }[fault]
        return Response(200 if fault != "html" else 403, body)

    with pytest.raises(NoProviders, match=r"127\.0\.0\.1.*\(gateway\): "):
        fetch_through(app, cid, tmp_path / "out.gguf")
