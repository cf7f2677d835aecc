"""Artefacts: what is written is read again, what does not fit is refused, and where presses look for them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save, save_file
from tests.contract.architectures import BY_NAME, tiny, tokens
from transformers import PreTrainedModel

from coldpress import ExpectedAttentionStatsPress, PressedCache, QFilterPress, make_press
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import OutputError, PressError, UnreachableError
from coldpress.io.artefacts import Artefact, artefact_path, artefacts_folder, read_artefact
from coldpress.io.network import fetch_hub_file, fetch_url

NAME = "EleutherAI/pythia-70m"


def filters(seed: int = 0) -> dict[str, torch.Tensor]:
    """For the tiny Llama: 2 layers, 2 KV heads, 8 dimensions."""
    return {"filters": torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))}


def kept(press: QFilterPress, model: PreTrainedModel | None = None) -> list[list[int]]:
    past = PressedCache(press)
    (model or tiny("llama"))(tokens(1, 30), **cache_argument(past))
    return past.positions(0)[0].tolist()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path / "artefacts"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def named() -> PreTrainedModel:
    """A tiny Llama that says that it was loaded from the hub."""
    model = BY_NAME["llama"].build()
    model.config._name_or_path = NAME
    return model


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.safetensors"
    Artefact("qfilter", filters(), {"model": NAME, "n_tokens": 7}).save(path)
    read = read_artefact(path, "qfilter", {})
    assert torch.equal(read.tensors["filters"], filters()["filters"])
    assert read.facts == {"model": NAME, "n_tokens": 7} and read.source == str(path)
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Artefact("qfilter", filters()).save(tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is damaged or no safetensors file"),
        (lambda data: b"", "is damaged or no safetensors file"),
        (lambda data: b"hello", "is damaged or no safetensors file"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its numbers are not those that were written"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "a.safetensors"
    Artefact("qfilter", filters()).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        PressError, match=rf"a.safetensors is damaged.*{message[-20:]}.* again with coldpress calibrate"
    ):
        kept(QFilterPress(0.5, filters=str(path)))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    Artefact("qfilter", {"filters": torch.full((2, 2, 8), torch.nan)}).save(tmp_path / "a.safetensors")
    with pytest.raises(PressError, match="not finite"):
        kept(QFilterPress(0.5, filters=str(tmp_path / "a.safetensors")))


def test_artefacts_of_another_press_or_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Artefact("duo_attention", filters()).save(path)
    with pytest.raises(PressError, match=r"a.safetensors is for duo_attention, not for qfilter; make it again"):
        kept(QFilterPress(0.5, filters=str(path)))
    for tensors, there in (
        ({"filters": torch.zeros(3, 2, 8)}, "3x2x8"),
        ({"filters": torch.zeros(2, 4, 8)}, "2x4x8"),
        ({"filters": torch.zeros(2, 2, 16)}, "2x2x16"),
        ({"filters": torch.zeros(2, 2)}, "2x2"),
        ({"other": torch.zeros(2, 2, 8)}, "nothing"),
    ):
        Artefact("qfilter", tensors, {"model": "some/other"}).save(path)
        with pytest.raises(PressError, match=rf"another model \(some/other\): its filters are {there}, .* needs 2x2x8"):
            kept(QFilterPress(0.5, filters=str(path)))
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(PressError, match=r"not for qfilter: it has no 'q_filters', only \['weight'\]"):
        kept(QFilterPress(0.5, filters=str(path)))


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    press, found = QFilterPress(0.5, filters=str(path)), []
    for seed in (0, 1):
        Artefact("qfilter", filters(seed)).save(path)
        found.append(kept(press))
    assert found[0] != found[1]


# -- where presses look -----------------------------------------------------------------------------------------------


def test_what_is_given_counts_before_what_is_here(folder: Path, named: PreTrainedModel) -> None:
    Artefact("qfilter", filters(1)).save(artefact_path("qfilter", NAME))
    given = folder / "given.safetensors"
    Artefact("qfilter", filters(2)).save(given)
    assert artefact_path("qfilter", NAME) == folder / "artefacts" / "qfilter" / "EleutherAI--pythia-70m.safetensors"
    first, second = kept(QFilterPress(0.5), named), kept(QFilterPress(0.5, filters=str(given)), named)
    assert first != second
    assert first == kept(QFilterPress(0.5, filters=str(artefact_path("qfilter", NAME))))


def test_models_in_folders_have_artefacts_of_their_own(folder: Path) -> None:
    (folder / "x" / "model").mkdir(parents=True)
    (folder / "y" / "model").mkdir(parents=True)
    paths = {artefact_path("qfilter", str(folder / name / "model")) for name in "xy"}
    assert len(paths) == 2 and all(path.name.startswith("model-") for path in paths)
    assert artefact_path("qfilter", str(folder / "x" / ".." / "x" / "model")) in paths


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDPRESS_ARTEFACTS")
    assert artefacts_folder() == Path.home() / ".cache" / "coldpress" / "artefacts"


def test_a_missing_artefact_says_what_to_do(folder: Path, named: PreTrainedModel) -> None:
    path = re.escape(str(folder / "artefacts" / "qfilter" / "EleutherAI--pythia-70m.safetensors"))
    message = (
        rf"^QFilterPress needs filters of {NAME}: there is no {path}, and the Hugging Face hub could not be reached "
        r"for nthngdy/pythia-70m_qfilt \(offline mode, HF_HUB_OFFLINE is set\)\. Make them with coldpress calibrate "
        rf"qfilter --model {NAME} --dataset wikitext\.$"
    )
    with pytest.raises(PressError, match=message):
        kept(QFilterPress(0.5), named)
    with pytest.raises(PressError, match=message), QFilterPress(0.5)(named):
        pass
    with pytest.raises(PressError, match=message):  # of a press inside another one
        make_press("qfilter", 0.5).prepared(named)
    with pytest.raises(
        PressError, match=r"was not loaded from anywhere.*--output PATH, and give them: QFilterPress\(fil"
    ):
        kept(QFilterPress(0.5))
    with pytest.raises(PressError, match=r"filters='nowhere/at/all' is no file or folder that is here"):
        kept(QFilterPress(0.5, filters="nowhere/at/all"))
    with pytest.raises(PressError, match=r"filters='nthngdy/x_qfilt': no such file or folder here, and the Hugging"):
        kept(QFilterPress(0.5, filters="nthngdy/x_qfilt"))


# -- published artefacts ----------------------------------------------------------------------------------------------


class Hub:
    """A server on this machine that answers as the hub does, with the files it is given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, with_body: bool) -> None:
                hub.asked.append(self.path)
                data = hub.files.get(self.path)
                self.send_response(hub.status if data is not None or hub.status >= 500 else 404)
                if data is None:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(data or b"")))
                self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
                self.send_header("X-Repo-Commit", "a" * 40)
                self.end_headers()
                if with_body:
                    self.wfile.write(data or b"")

            def do_GET(self) -> None:
                self.answer(True)

            def do_HEAD(self) -> None:
                self.answer(False)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("coldpress.learned.calibrated._LOADED", {})
    reset = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)  # before 1.0, a session stays offline
    reset()
    yield made
    reset()
    made.server.shutdown()
    made.server.server_close()


def test_published_filters_are_fetched_once(
    hub: Hub, named: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = {"q_filters": filters(3)["filters"].bfloat16()}
    hub.files["/nthngdy/pythia-70m_qfilt/resolve/main/model.safetensors"] = save(published)
    Artefact("qfilter", {"filters": published["q_filters"].float()}).save(folder / "same.safetensors")
    same = kept(QFilterPress(0.5, filters=str(folder / "same.safetensors")))
    assert kept(QFilterPress(0.5), named) == same
    n_asked = len(hub.asked)
    assert kept(QFilterPress(0.5), named) == same
    monkeypatch.setattr("coldpress.learned.calibrated._LOADED", {})  # as in another process, later, without a network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert kept(QFilterPress(0.5), named) == same
    assert kept(QFilterPress(0.5, filters="nthngdy/pythia-70m_qfilt")) == same
    assert len(hub.asked) == n_asked


def test_filters_that_nobody_has_published(hub: Hub, named: PreTrainedModel) -> None:
    with pytest.raises(PressError, match=r"and none are published for this model\. Make them with coldpress calibrate"):
        kept(QFilterPress(0.5), named)
    with pytest.raises(PressError, match="is no file or folder that is here, and no repository of the hub"):
        kept(QFilterPress(0.5, filters="nthngdy/x_qfilt"))


def test_which_repositories_are_asked() -> None:
    press = QFilterPress()
    assert press.repository("meta-llama/Meta-Llama-3.1-8B") == "nthngdy/Llama-3.1-8B_qfilt"
    assert press.repository("meta-llama/Meta-Llama-3.1-405B") == "nthngdy/Meta-Llama-3.1-405B_qfilt"
    wanted = "alessiodevoto/exp_att_stats_meta-llama_Llama-3.1-8B-Instruct_kmfoda_booksum_100_1000_4"
    assert ExpectedAttentionStatsPress().repository("meta-llama/Llama-3.1-8B-Instruct") == wanted


def test_published_statistics_in_a_folder(folder: Path) -> None:
    mean, half = torch.randn(2, 4, 8), torch.randn(2, 4, 8, 8)
    save_file({"query_mean": mean, "query_cov": half @ half.mT}, folder / "model.safetensors")
    press = ExpectedAttentionStatsPress(0.5, stats_folder=str(folder))
    past = PressedCache(press)
    tiny("llama")(tokens(1, 30), **cache_argument(past))
    assert past.stored_lengths() == [15, 15]
    with pytest.raises(PressError, match=r"another model: its mean are 2x4x8, and this model needs 2x4x16"):
        tiny("gpt_neox")(tokens(1, 30), **cache_argument(PressedCache(press)))


def test_a_hub_that_fails(hub: Hub) -> None:
    hub.status = 503
    with pytest.raises(UnreachableError, match=r"could not be reached for a/b \(http://127.0.0.1:\d+: status 503\)"):
        fetch_hub_file("a/b", "c")


def test_a_connection_that_breaks_is_not_an_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_hub_download then raises what it raises for a file that does not exist, more or less."""

    def download(repo: str, name: str, local_files_only: bool = False) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here" if local_files_only else "gone while loading")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UnreachableError, match=r"could not be reached for a/b \(gone while loading\)"):
        fetch_hub_file("a/b", "c")


def test_files_from_elsewhere(hub: Hub, folder: Path) -> None:
    hub.files["/a.tsv"] = b"1\t2\n"
    copy = folder / "copies" / "a.tsv"
    for _ in range(2):
        assert fetch_url(f"{hub.url}/a.tsv", copy) == copy and copy.read_bytes() == b"1\t2\n"
    assert hub.asked == ["/a.tsv"]
    assert fetch_url(f"{hub.url}/b.tsv", folder / "b.tsv") is None
    hub.status = 500
    with pytest.raises(UnreachableError, match=r"b.tsv could not be fetched \(status 500\)"):
        fetch_url(f"{hub.url}/b.tsv", folder / "b.tsv")
    with pytest.raises(UnreachableError, match=r"could not be fetched \(.*refused"):
        fetch_url("http://127.0.0.1:9/b.tsv", folder / "b.tsv")
    assert [path.name for path in copy.parent.iterdir()] == ["a.tsv"]
