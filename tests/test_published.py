"""Published weights, with and without a network: what is fetched from where, and what is said if nothing is."""

import io
import socket
import time
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import timm
import torch

import visattn
from visattn import published
from visattn.published import Web, check_published, fetch, find_sources
from visattn.weights import WeightsError

NAME = "test_dinat"
REPOSITORY = "someone/some-model"
# of each host, with what its error has to name: address, and place to put the file
OFFLINE = {
    "maxvit_tiny_va": ("https://huggingface.co/timm/maxvit_tiny_tf_224.in1k (model.safetensors or", "HF_HUB_CACHE"),
    "transnext_micro": ("https://huggingface.co/DaiShiResearch/transnext-micro-224-1k (transn", "HF_HUB_CACHE"),
    "dinat_s_tiny": ("https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_", "TORCH_HOME"),
    "nat_mini": ("https://huggingface.co/shi-labs/nat-mini-in1k-224 (", "/nat_mini.pth (below TORCH_HOME)"),
    "agent_deit_tiny": ("https://cloud.tsinghua.edu.cn/f/", "/agent_deit_tiny.in1k.pth (below TORCH_HOME)"),
}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches, and no proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def block(monkeypatch, act):
    """Let nobody look up an address or connect."""
    monkeypatch.setattr(socket, "getaddrinfo", act)
    monkeypatch.setattr(socket.socket, "connect", act)


@pytest.fixture
def offline(monkeypatch):
    """No network, which says so at once."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    block(monkeypatch, refuse)


@pytest.fixture
def silence(monkeypatch):
    """A network that answers nothing, with a little patience."""
    block(monkeypatch, lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr(published, "WARN_SECONDS", 0.2)
    monkeypatch.setattr(published, "GIVE_UP_SECONDS", 0.6)


@pytest.fixture(scope="module")
def model():
    return timm.create_model(NAME)


@pytest.fixture(scope="module")
def file(model):
    """Content of a file of weights."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.getvalue()


class Host(ThreadingHTTPServer):
    """A host of files by path, which is a hub and a proxy too; `asked` are the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.delay, self.refuses_head = 0.0, False
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Host

    def do_HEAD(self):
        time.sleep(self.server.delay)
        self.server.asked.append(f"{self.command} {self.path}")
        content = self.server.files.get(self.path.partition("?")[0])
        refused = self.server.refuses_head and self.command == "HEAD"
        self.send_response(405 if refused else 404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{zlib.crc32(content or b"")}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if content and self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    with Host() as host:
        Thread(target=host.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", host.address)
        template = host.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield host
        host.shutdown()


def create(**overlay):
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def assert_same(got, expected):
    expected = expected.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in got.state_dict().items())


@pytest.mark.parametrize("ask", [lambda name: timm.create_model(name, pretrained=True), check_published])
@pytest.mark.parametrize("name", OFFLINE)
def test_without_a_network_one_sentence_says_what_is_missing(name, ask, offline, caches):
    begin = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        ask(name)
    assert time.perf_counter() - begin < 5
    said, tag = str(caught.value), timm.get_pretrained_cfg(name).tag
    assert said.startswith(f"expected weights of {name}.{tag}, got none from {OFFLINE[name][0]}")
    assert "Temporary failure in name resolution" in said
    assert "; try again with a network, or a copy at /" in said
    assert str(caches) in said
    assert OFFLINE[name][1] in said
    assert said.endswith("or anywhere with pretrained_cfg_overlay=dict(file=...)")
    assert "\n" not in said


def test_a_network_that_answers_nothing_is_told_in_time(silence):
    with (
        pytest.warns(UserWarning, match=r"expected weights of nat_mini.in1k, got .* no answer in 0.2 s.*still waiting"),
        pytest.raises(WeightsError, match=r"huggingface.co/shi-labs.* in 0.6 s nor from https://shi-labs.com.*"),
    ):
        timm.create_model("nat_mini", pretrained=True)


def test_the_warning_comes_within_five_seconds():
    assert published.WARN_SECONDS < 5


@pytest.mark.parametrize("name", ["coatnet_7_va", "biformer_base", NAME])
def test_models_without_weights_are_not_built_first(name, monkeypatch):
    monkeypatch.setattr("visattn.models._build._construct", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(WeightsError, match=rf"expected the published weights of {name}, got no address of any; try"):
        timm.create_model(name, pretrained=True)


def test_offline_mode_of_the_hub_is_heeded(monkeypatch, host):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        create(hf_hub_id=REPOSITORY)
    assert not host.asked


def test_files_in_a_cache_load_without_a_look_at_the_network(model, file, caches, silence):
    for folder, overlay in (
        ("torch/hub/checkpoints", {"url": "https://example.invalid/some/weights.pth"}),
        ("elsewhere", {"url": "https://example.invalid/some/weights.pth"}),
        (f"hub/models--someone--some-model/snapshots/{'a' * 40}", {"hf_hub_id": REPOSITORY}),
    ):
        path = caches / folder / ("weights.pth" if "url" in overlay else "pytorch_model.bin")
        path.parent.mkdir(parents=True)
        path.write_bytes(file)
        if "hf_hub_id" in overlay:
            refs = path.parents[2] / "refs"
            refs.mkdir()
            (refs / "main").write_text("a" * 40)
        cache_dir = {"cache_dir": path.parent} if folder == "elsewhere" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **cache_dir)
        assert_same(loaded, model)
        assert loaded.pretrained_cfg["state_dict"] is None
        path.unlink()


def test_a_hub_serves_what_it_has(model, file, host, caches):
    host.files[f"/{REPOSITORY}/resolve/main/pytorch_model.bin"] = file
    assert_same(create(hf_hub_id=REPOSITORY, url=f"{host.address}/weights.pth"), model)
    assert not [request for request in host.asked if "weights.pth" in request]
    assert (caches / "hub" / "models--someone--some-model").is_dir()
    host.asked.clear()
    assert_same(create(hf_hub_id=REPOSITORY), model)
    assert not host.asked


def test_a_repository_of_ours_names_its_model(model, host, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: pytest.fail("timm reads too"))
    timm.models.save_for_hf(model, tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        host.files[f"/{REPOSITORY}/resolve/main/{path.name}"] = path.read_bytes()
    loaded = timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True)
    assert_same(loaded, model)
    assert loaded.pretrained_cfg["source"] == "hf-hub"


def test_the_second_address_serves_what_the_first_does_not_have(model, file, host, caches):
    host.files["/weights.pth"] = file
    loaded = create(hf_hub_id=REPOSITORY, url=f"{host.address}/weights.pth")
    assert_same(loaded, model)
    assert loaded.pretrained_cfg["hf_hub_id"] == REPOSITORY
    assert (caches / "torch/hub/checkpoints/weights.pth").is_file()


def test_what_no_address_has_is_said_of_each(host):
    with pytest.raises(
        WeightsError, match=r"got none from \S*/someone/some-model \(.* 404 .*nor from .*HTTP Error 404"
    ):
        create(hf_hub_id=REPOSITORY, url=f"{host.address}/weights.pth")


def test_a_slow_host_is_waited_for(model, file, host, monkeypatch):
    monkeypatch.setattr(published, "WARN_SECONDS", 0.1)
    host.delay, host.files["/weights.pth"] = 0.5, file
    with pytest.warns(UserWarning, match="still waiting"):
        assert_same(create(url=f"{host.address}/weights.pth"), model)


def test_a_proxy_is_asked_where_there_is_one(model, file, host, monkeypatch):
    monkeypatch.setattr("urllib.request._opener", None)  # urllib reads the environment once
    monkeypatch.setenv("http_proxy", host.address)
    monkeypatch.setenv("no_proxy", "")
    host.files["http://example.invalid/weights.pth"] = file
    assert_same(create(url="http://example.invalid/weights.pth"), model)
    assert host.asked == ["HEAD http://example.invalid/weights.pth", "GET http://example.invalid/weights.pth"]


def test_a_share_is_kept_under_a_name_that_can_be_read(model, file, host, caches):
    """From a host that refuses to be asked without serving."""
    host.files["/f/1a2b3c"], host.refuses_head = file, True
    assert_same(create(url=f"{host.address}/f/1a2b3c?dl=1", tag="in1k"), model)
    assert (caches / "torch/hub/checkpoints/test_dinat.in1k.pth").is_file()


def test_no_two_files_share_a_name():
    names = {}
    for name in visattn.list_models(pretrained=True):
        for source in find_sources(timm.get_pretrained_cfg(name)):
            if isinstance(source, Web):
                assert names.setdefault(source.name, source.url) == source.url
                assert source.name.endswith(".pth")
    assert "agent_swin_tiny.in1k.pth" in names


def test_the_page_on_weights_names_every_host():
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    for name in visattn.list_models(pretrained=True):
        for source in find_sources(timm.get_pretrained_cfg(name)):
            host = urlsplit(source.url).hostname if isinstance(source, Web) else source.repository.partition("/")[0]
            assert f"| {host} |" in page or f"Hugging Face hub, `{host}/...`" in page, host


def test_all_files_of_the_hub_are_tried_in_timms_order(host):
    cfg = timm.get_pretrained_cfg("transnext_micro")
    with pytest.raises(WeightsError):
        fetch(cfg)
    begin = "/DaiShiResearch/transnext-micro-224-1k/resolve/main/transnext_micro_224_1k"
    asked = [request.partition(" ")[2] for request in host.asked]
    assert list(dict.fromkeys(asked)) == [f"{begin}.safetensors", f"{begin}.pth"]
