"""Published weights: names, caches, a real HTTP server, and no network at all."""

import contextlib
import hashlib
import http.server
import inspect
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save

from tests.support import CLIPS, clip_for
from vidfuse.models import hubs, select, weights

PUBLISHING = [
    name
    for name in select.names("backbones")
    if "pretrained" in inspect.signature(select.builder("backbones", name)).parameters
]
INFLATED = ["i3d", "inception_i3d"]
LICENSED = {"dinov3": "DINOv3 License", "videomae": "CC-BY-NC 4.0", "timesformer": "CC-BY-NC 4.0"}
CONTENT = save({"a": torch.arange(5000.0)})
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def site():
    """An HTTP server with a file, one that is cut short and one that is not there; it notes what was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if "nothere" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            time.sleep(0.2)
            self.wfile.write(CONTENT[:100] if "short" in self.path else CONTENT)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in PUBLISHING), *((n, {"inflate": True}) for n in INFLATED)])
def test_without_network_every_backbone_says_at_once_what_to_get_and_where_it_goes(name, options, offline, caplog):
    assert len(PUBLISHING) >= 15
    frames, size = clip_for(name, (*CLIPS, (16, 224)))
    with torch.device("meta"):
        model = select.build("backbones", name, frames=frames, size=size, pretrained=True, **options)
    missing = weights.loaded(model).missing
    for get in (missing.ask, missing.fetch):
        begun = time.monotonic()
        with pytest.raises(
            ValueError, match=r"cannot be fetched .*put the file .*https://\S+ on this machine and give weights=<its path>"
        ):
            get()
        assert time.monotonic() - begun < hubs.ANSWER_SECONDS
    assert (name in LICENSED) == bool(caplog.records) and LICENSED.get(name, "") in caplog.text


@pytest.mark.parametrize("source", ["hf:timm/resnet18.tv_in1k", "https://example.invalid/resnet18.pth"])
def test_a_name_that_resolves_to_nothing_is_told_within_seconds(source):
    """For real, not simulated: on a networked machine the first is there, and then nothing is shown."""
    begun = time.monotonic()
    with contextlib.suppress(ValueError):
        hubs.named(source).ask()
    assert time.monotonic() - begun < 3 * hubs.ANSWER_SECONDS


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(hubs, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file = hubs.named(f"http://127.0.0.1:{silent.getsockname()[1]}/a.pth", sha256=DIGEST)
        begun = time.monotonic()
        with pytest.raises(ValueError, match="timed out"):
            file.fetch()
    assert time.monotonic() - begun < 5


def test_an_address_is_fetched_once_verified_and_kept(site):
    url, asked = site
    file = hubs.named(f"{url}/a.safetensors", sha256=DIGEST)
    file.ask()
    assert file.here() is None
    asked.clear()
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: file.fetch(), range(4)))
    assert asked == ["/a.safetensors"] and {p.read_bytes() for p in paths} == {CONTENT} and file.here() == paths[0]
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(5000))
    weights.load(module, f"{url}/a.safetensors#sha256={DIGEST}")
    assert torch.equal(module.a, torch.arange(5000.0)) and weights.loaded(module).sha256 == DIGEST
    assert asked == ["/a.safetensors"]


@pytest.mark.parametrize(
    ("path", "digest", "said"),
    [
        ("a.pth", "0" * 64, f"what came has sha256 {DIGEST}, stated is 000"),
        ("short.pth", DIGEST, "the connection ended after 100 of"),
        ("nothere.pth", DIGEST, "HTTP Error 404"),
    ],
)
def test_what_does_not_come_whole_is_not_kept(site, path, digest, said, tmp_path):
    file = hubs.named(f"{site[0]}/{path}", sha256=digest)
    with pytest.raises(ValueError, match=said):
        file.fetch()
    assert file.here() is None and not [
        p for p in (tmp_path / "torch").rglob("*") if p.is_file() and not p.name.endswith(".lock")
    ]


def test_names_are_those_of_their_hubs():
    assert hubs.named("hf:facebook/vjepa2-vitl-fpc64-256") == weights.from_hub("facebook/vjepa2-vitl-fpc64-256")
    assert hubs.named("hf:a/b@v1/sub/x.safetensors") == hubs.HubFile("a/b", ("sub/x.safetensors",), "v1")
    assert hubs.named("timm:resnet50.tv_in1k") == weights.from_hub("timm/resnet50.tv_in1k")
    video = hubs.named("torchvision:R3D_18_Weights.KINETICS400_V1")
    assert video.url == "https://download.pytorch.org/models/r3d_18-b3b3357e.pth" and video.digest == "b3b3357e"
    assert hubs.named("/a/b.pth") is hubs.named("b.pth") is hubs.named("file:///a/b.pth") is None
    assert str(weights.resolve("file:///a/b.pth")[0]) == "/a/b.pth"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://bucket/a.pth", "s3:// is not read here. Training and scoring jobs fetch s3://"),
        ("gopher://a/b.pth", "gopher:// is not read here"),
        ("hf:nameless", "give hf:OWNER/REPOSITORY"),
        ("timm:resnet50.nosuch", r"Invalid pretrained tag.*list_pretrained"),
        ("torchvision:R3D_18_Weights", "a name looks like R3D_18_Weights.KINETICS400_V1"),
        ("http://host/a.pth", "can be altered on its way"),
        ("https://me:secret@host/a.pth", "https://host/a.pth: give an address of a file"),
        ("https://host/", "give an address of a file"),
        ("a.pth#sha256=12", "a sha256 has 64 hexadecimal digits, given '12'"),
    ],
)
def test_a_source_that_cannot_be_is_refused_in_words(source, said):
    with torch.device("meta"), pytest.raises(ValueError, match=said) as caught:
        weights.load(torch.nn.Linear(1, 1), source)
    assert "secret" not in str(caught.value)


def test_gated_weights_say_how_to_get_access(monkeypatch):
    def refused(*_args, **_kwargs):
        raise GatedRepoError("403 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refused)
    said = r"gated: accept their licence at https://huggingface\.co/facebook/dinov3-x, then run `hf auth login`"
    with pytest.raises(ValueError, match=said):
        hubs.named("hf:facebook/dinov3-x").fetch()


CLASSIFIERS = {
    "c3d": "fc8.",
    "inception_i3d": "logits.conv3d.",
    "i3d": "blocks.6.proj.",
    "mvit": "head.1.",
    "r2plus1d": "fc.",
    "r3d": "fc.",
    "resnet2d": "fc.",
    "swin3d": "head.",
    "timesformer": "classifier.",
    "videomae": "classifier.",
    "vjepa2": "classifier.",
}


@pytest.mark.parametrize("name", PUBLISHING)
@pytest.mark.parametrize("classes", [7, 400])
def test_a_classifier_in_the_file_is_dropped_with_a_line_that_names_it(name, classes, caplog):
    frames, size = clip_for(name, (*CLIPS, (16, 224)))
    with torch.device("meta"):
        model = select.build("backbones", name, frames=frames, size=size)
        classifier = CLASSIFIERS.get(name, "head.")
        state = {key.removeprefix("vit."): value for key, value in model.state_dict().items()}
        state |= {f"{classifier}weight": torch.empty(classes, 5), f"{classifier}bias": torch.empty(classes)}
        with caplog.at_level(logging.INFO):
            weights.check(model, model.published_state(state), said="file")
    (line,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    prefix = "blocks.6." if name == "i3d" else f"{classifier.split('.')[0]}."
    assert "2 tensors of the file are not used" in line and line.endswith(f"({prefix})")
