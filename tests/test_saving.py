"""A saved cache goes on exactly as it would have; damaged files and other models are refused."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tests.contract.architectures import ARCHITECTURES, BY_NAME, ROTARY_VARIANTS, tiny, tokens
from tests.presses.others import OTHERS, press_of, small_press
from tests.saved import IDS, SCHEDULES, N, check_same, go_on, prefilled
from torch import Tensor
from transformers import PreTrainedModel

import coldpress
from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    KVBits,
    LayerView,
    PressedCache,
    SnapKVPress,
    ThinKPress,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.file import FORMATS
from coldpress.core.data import as_data, from_data
from coldpress.errors import CacheError, OutputError, PressError
from coldpress.io.artefacts import Artefact

ROOT = Path(__file__).resolve().parents[1]
STATES = ("lfm2", "qwen3_next")


def through_a_file(past: PressedCache, path: Path, model: PreTrainedModel | None = None) -> PressedCache:
    model = model or tiny("llama")
    past.save(path, model)
    return PressedCache.load(path, model)


# -- what is saved goes on --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("name", [*press_names(at_prefill=True), "no_press"])
@pytest.mark.thinned(5)
def test_every_press_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    press = None if name == "no_press" else small_press(name, "llama")
    past = prefilled(press)
    loaded = through_a_file(past, tmp_path / "a.safetensors")
    check_same(loaded, past)
    assert loaded.press == press
    assert torch.equal(go_on(loaded), go_on(past))
    check_same(loaded, past)
    check_same(through_a_file(loaded, tmp_path / "a.safetensors"), past)  # later turns are saved too


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES + ROTARY_VARIANTS if a.name not in STATES], ids=str)
@pytest.mark.parametrize(
    "press", [SnapKVPress(0.5, window_size=8), AdaKVPress(KnormPress(0.5))], ids=["dense", "ragged"]
)
@pytest.mark.thinned(7)
def test_every_architecture(architecture: Any, press: BasePress, tmp_path: Path) -> None:
    model, later = architecture.build(), architecture.build()
    past = prefilled(press, model)
    past.save(tmp_path / "a.safetensors", model)
    loaded = PressedCache.load(tmp_path / "a.safetensors", later)
    check_same(loaded, past)
    assert torch.equal(go_on(loaded, later), go_on(past, model))


@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_press_that_goes_on_while_decoding_goes_on(name: str, tmp_path: Path) -> None:
    """In the middle of an interval: with the queries, counters, sums and verdicts that it had."""
    past = prefilled(SCHEDULES[name])
    with torch.no_grad():
        for part in tokens(1, 13, seed=2).split([6] + [1] * 7, dim=1):
            tiny("llama")(part, **cache_argument(past))
    before = past.achieved_ratio(), past.stored_lengths()
    loaded = through_a_file(past, tmp_path / "a.safetensors")
    check_same(loaded, past)
    assert torch.equal(go_on(loaded), go_on(past))
    check_same(loaded, past)
    assert loaded.stored_lengths() != [n + 25 for n in before[1]]  # it has compressed since


@pytest.mark.parametrize("n_pieces", [1, 3])
def test_a_prompt_in_pieces_goes_on(n_pieces: int, tmp_path: Path) -> None:
    """In the middle of the prompt as well as after it."""
    model, ids = tiny("llama"), tokens(1, 60)
    past = PressedCache(SnapKVPress(0.5, window_size=4), chunk_tokens=16)
    with torch.no_grad():
        for piece in ids.split(16, dim=1)[:n_pieces]:
            model(piece, **cache_argument(past))
        loaded = through_a_file(past, tmp_path / "a.safetensors")
        check_same(loaded, past)
        for piece in ids.split(16, dim=1)[n_pieces:]:
            assert torch.equal(*(model(piece, **cache_argument(each)).logits for each in (loaded, past)))
    check_same(loaded, past)
    assert torch.equal(go_on(loaded), go_on(past))


@pytest.mark.parametrize("press", [None, SnapKVPress(0.5, window_size=8), AdaKVPress(KnormPress(0.5))])
def test_pairs_in_few_bits_go_on(press: BasePress | None, tmp_path: Path) -> None:
    past = PressedCache(press, kv_bits=KVBits(2, 4, 6))
    with torch.no_grad():
        tiny("llama")(IDS, **cache_argument(past))
    path = tmp_path / "a.safetensors"
    loaded = through_a_file(past, path)
    check_same(loaded, past)
    assert torch.equal(go_on(loaded), go_on(past))
    check_same(loaded, past)
    assert torch.equal(go_on(through_a_file(loaded, path)), go_on(past))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_move_up_go_on(dtype: torch.dtype, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("gpt_neox")).to(dtype)
    past = PressedCache(DecodingPress(SnapKVPress(window_size=4), 7, 20), positions="rerotate")
    with torch.no_grad():
        for piece in tokens(1, 50).split(5, dim=1):
            model(piece, **cache_argument(past))
    loaded = through_a_file(past, tmp_path / "a.safetensors", model)
    check_same(loaded, past)
    assert ("rounding_residual" not in past.layer(0).columns()) == (dtype == torch.float32)
    assert torch.equal(go_on(loaded, model), go_on(past, model))


def test_a_press_inside_a_block_goes_on(tmp_path: Path) -> None:
    """DMS with trained scores looks at hidden states while decoding too."""
    model, press = tiny("llama"), DecodingPress(KnormPress(), 5, 20)
    past = PressedCache()
    with press(model):
        model(IDS, **cache_argument(past))
    assert past.press is None  # the block is over, and the press with it
    loaded = through_a_file(past, tmp_path / "a.safetensors")
    with press(model), torch.no_grad():
        expected = PressedCache(press)
        model(IDS, **cache_argument(expected))
        assert torch.equal(go_on(through_a_file(expected, tmp_path / "a.safetensors")), go_on(expected))
    assert loaded.press is None


def test_sliding_windows_that_have_forgotten(tmp_path: Path) -> None:
    for name in ("gemma3", "mistral"):
        model = tiny(name)
        past = prefilled(SnapKVPress(0.3, window_size=8), model, tokens(1, 200))
        go_on(past, model)
        loaded = through_a_file(past, tmp_path / "a.safetensors", model)
        check_same(loaded, past)
        assert past.layer(0).stored_length < 150
        for each in (past.fork(), loaded.fork()):
            each.crop(-5)
            with pytest.raises(CacheError, match=r"Crop to 2.. or more"):
                each.crop(150)
        assert torch.equal(go_on(loaded, model), go_on(past, model))


def test_bfloat16_and_the_eager_backend(tmp_path: Path) -> None:
    model = tiny("gemma2", "coldpress_eager", torch.bfloat16)
    past = prefilled(ThinKPress(0.5, 8, press=KnormPress(0.3)), model)
    loaded = through_a_file(past, tmp_path / "a.safetensors", model)
    assert loaded.layer(1).keys.dtype == torch.bfloat16
    assert torch.equal(go_on(loaded, model), go_on(past, model))


@pytest.mark.parametrize("press", [SnapKVPress(0.5, window_size=8), AdaKVPress(KnormPress(0.5)), "think"])
def test_crop_fork_and_beams_of_a_loaded_cache(press: BasePress | str, tmp_path: Path) -> None:
    press = press if isinstance(press, BasePress) else OTHERS[press](2, 2)
    past, model = prefilled(press), tiny("llama")
    go_on(past)
    loaded = through_a_file(past, tmp_path / "a.safetensors")
    for each in (past, loaded):
        with pytest.raises(CacheError, match=f"Crop to {N} or more"):
            each.crop(N - 1)
        each.crop(-7)
    check_same(loaded, past)
    child = loaded.fork()
    assert torch.equal(go_on(child), go_on(past.fork()))
    check_same(loaded, past)
    ids = torch.cat([torch.zeros(1, N + 18, dtype=torch.long), tokens(1, 3, seed=4)], dim=1)
    answers = []
    for each in (past, loaded):
        beams = each.fork()
        beams.batch_repeat_interleave(3)
        answers.append(model.generate(ids, **cache_argument(beams), num_beams=3, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)


def test_a_batch_with_padding(tmp_path: Path) -> None:
    model, press, path = tiny("llama"), SnapKVPress(0.5, window_size=4), tmp_path / "a.safetensors"
    ids, mask = tokens(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :9], mask[2, 22:] = 0, 0
    past = PressedCache(press)
    model(ids, attention_mask=mask, **cache_argument(past))
    with pytest.raises(CacheError, match=r"has padding.* give attention_mask=.* of all 30 tokens"):
        past.save(path, model)
    with pytest.raises(CacheError, match=r"must be of all tokens .*\(3, 30\), got \(3, 29\)"):
        past.save(path, model, attention_mask=mask[:, :29])
    past.save(path, model, attention_mask=mask)
    loaded = PressedCache.load(path, model)
    check_same(loaded, past)
    assert loaded.attention_mask.dtype == torch.bool and torch.equal(loaded.attention_mask.long(), mask)
    assert torch.equal(loaded.fork().attention_mask, loaded.attention_mask)
    more = torch.cat([loaded.attention_mask.long(), torch.ones(3, 4, dtype=torch.long)], dim=1)
    last = tokens(3, 4, seed=2)
    answers = [model(last, attention_mask=more, **cache_argument(each)).logits for each in (past, loaded)]
    assert torch.equal(*answers)
    loaded.crop(-2)
    assert torch.equal(loaded.attention_mask, mask.bool())  # of no token that came later
    fork = loaded.fork()
    fork.crop(-2)
    for rows, change in (
        ([2, 0], lambda: fork.reorder_cache(torch.tensor([2, 0]))),
        ([0, 2], lambda: fork.batch_select_indices(torch.tensor([1, 0]))),
        ([0, 0, 2, 2], lambda: fork.batch_repeat_interleave(2)),
    ):
        change()
        assert torch.equal(fork.attention_mask.long(), mask[rows])
    assert torch.equal(loaded.attention_mask, mask.bool())
    loaded.reset()
    assert loaded.attention_mask is None


def test_a_single_padded_row_is_asked_one_token(tmp_path: Path) -> None:
    model, path, mask = tiny("llama"), tmp_path / "a.safetensors", torch.ones(1, 20, dtype=torch.long)
    mask[:, :6] = 0
    past = PressedCache()
    model(tokens(1, 20), attention_mask=mask, **cache_argument(past))
    past.save(path, model, attention_mask=mask)
    loaded = PressedCache.load(path, model)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    answers = [model(tokens(1, 1), attention_mask=mask, **cache_argument(each)).logits for each in (past, loaded)]
    assert torch.equal(*answers)


def test_a_cache_filled_in_inference_mode_with_gradients_or_shared(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with torch.inference_mode():
        past = prefilled(SnapKVPress(0.5, window_size=8))
        past.save(path, tiny("llama"))
    assert torch.equal(go_on(PressedCache.load(path, tiny("llama"))), go_on(past))
    model = BY_NAME["llama"].build().requires_grad_(True)
    past = PressedCache(KnormPress(0.5))
    model(IDS, **cache_argument(past))
    loaded = through_a_file(past, path, model)
    assert not loaded.layer(0).keys.requires_grad
    parent = prefilled(KnormPress(0.5))
    child = parent.fork()
    assert torch.equal(go_on(through_a_file(child, path)), go_on(child))
    with torch.inference_mode():
        loaded = PressedCache.load(path, tiny("llama"))
    assert torch.equal(go_on(loaded), go_on(parent))


def test_the_file_is_as_large_as_what_is_held(tmp_path: Path) -> None:
    model = tiny("llama")
    for press in (None, KnormPress(0.5), AdaKVPress(KnormPress(0.5)), OTHERS["think"](2, 2)):
        past = prefilled(press, ids=tokens(1, 400))
        n_pairs = sum(int((layer.positions() >= 0).sum()) for layer in past.pressed_layers())
        past.save(tmp_path / "a.safetensors", model)
        size = (tmp_path / "a.safetensors").stat().st_size
        assert size < n_pairs * (8 + 8 + 1) * 4 + 10_000 < 400 * 2 * 2 * 17 * 4 + 10_001


def test_what_a_file_says(tmp_path: Path) -> None:
    """The press is text, and anybody can read which model and positions a file is of."""
    path = tmp_path / "a.safetensors"
    prefilled(SnapKVPress(0.5, window_size=8)).save(path, tiny("llama"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        kept = file.get_tensor("layers.0.kept")
    said = json.loads(metadata["cache"])
    assert metadata["format"] == f"coldpress cache {FORMATS[0]}" and said["coldpress"] == coldpress.__version__
    assert said["model"]["sizes"]["num_key_value_heads"] == 2 and said["model"]["dtype"] == "float32"
    assert said["press"]["repr"] == repr(SnapKVPress(0.5, window_size=8))
    assert said["layers"][0]["seen"] == N and kept.shape == (1, 2, N // 2)


# -- other processes --------------------------------------------------------------------------------------------------

WRITER = """
import sys
sys.path[:0] = [{src!r}, {root!r}]
import torch
torch.set_num_threads(1)
from tests.contract.architectures import tiny, tokens
from coldpress import AdaKVPress, KnormPress, PressedCache
from coldpress.architecture.cache_argument import cache_argument
past, model = PressedCache(AdaKVPress(KnormPress(0.5))), tiny("llama")
model(tokens(1, 53), **cache_argument(past))
past.save({path!r}, model)
torch.save(model(tokens(1, 5, seed=7), **cache_argument(past)).logits, {path!r} + ".logits")
"""
KILLED = """
import sys, os
sys.path[:0] = [{src!r}, {root!r}]
from tests.contract.architectures import tiny, tokens
from coldpress import PressedCache
from coldpress.architecture.cache_argument import cache_argument
past, model = PressedCache(), tiny("llama")
model(tokens(60, 500), **cache_argument(past))
print("ready", flush=True)
while True:
    past.save({path!r}, model)
"""


def script(text: str, path: Path) -> str:
    return text.format(src=str(ROOT / "src"), root=str(ROOT), path=str(path))


@pytest.mark.slow
def test_a_file_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    subprocess.run([sys.executable, "-c", script(WRITER, path)], check=True, timeout=120)
    expected = torch.load(f"{path}.logits", weights_only=True)
    loaded = PressedCache.load(path, tiny("llama"))
    assert torch.equal(tiny("llama")(tokens(1, 5, seed=7), **cache_argument(loaded)).logits, expected)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals of that kind")
def test_killed_while_saving_there_is_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    prefilled(KnormPress(0.5)).save(path, tiny("llama"))
    process = subprocess.Popen([sys.executable, "-c", script(KILLED, path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        found, deadline = [], time.monotonic() + 120
        while len(found) < 30 or 500 not in found:  # while it is written again and again
            found.append(PressedCache.load(path, tiny("llama")).seen_tokens)
            assert found[-1] in (N, 500) and time.monotonic() < deadline
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert PressedCache.load(path, tiny("llama")).seen_tokens == 500


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_a_file_is_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    """Files of safetensors were their owner's alone, whatever the umask, and those of JSON beside them were not."""
    before = os.umask(umask)
    try:
        for _ in range(2):  # a new file, and one in the place of an older one
            prefilled().save(tmp_path / "a.safetensors", tiny("llama"))
            Artefact("qfilter", {"filters": torch.zeros(1, 1)}).save(tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, past = tmp_path / "a.safetensors", prefilled()
    past.save(path, tiny("llama"))
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coldpress.io.artefacts.os.fsync", full)
    with pytest.raises(OutputError, match=r"a.safetensors cannot be written .*No space left.*name another file"):
        past.save(path, tiny("llama"))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.safetensors", tmp_path):
        with pytest.raises(OutputError, match="cannot be written"):
            past.save(target, tiny("llama"))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    prefilled(AdaKVPress(KnormPress(0.8)), ids=IDS[:, :20]).save(path, tiny("llama"))
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"hello",
        lambda data: data[:4],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"0",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b"layers.0", b"layers.1"),
        lambda data: b"\x80\x04" + data,
    ],
)
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damage(saved))
    with pytest.raises(CacheError, match=r"a.safetensors is damaged.*compress the context again and save it") as error:
        PressedCache.load(path, tiny("llama"))
    assert "\n" not in str(error.value)


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_byte_never_passes_for_the_cache(
    data: st.DataObject, saved: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = data.draw(st.integers(0, len(saved) - 1))
    flip = data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(saved[:at] + bytes([saved[at] ^ flip]) + saved[at + 1 :])
    try:
        loaded = PressedCache.load(path, tiny("llama"))
    except CacheError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # white space between header and tensors means nothing
        assert saved[at : at + 1].isspace()
        check_same(loaded, prefilled(AdaKVPress(KnormPress(0.8)), ids=IDS[:, :20]))


def test_other_files_are_refused(tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CacheError, match=r"There is no file .*a.safetensors"):
        PressedCache.load(path, tiny("llama"))
    with pytest.raises(CacheError, match="is a folder; name the file in it"):
        PressedCache.load(tmp_path, tiny("llama"))
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(CacheError, match="holds no cache that coldpress saved"):
            PressedCache.load(path, tiny("llama"))
    older = f"coldpress cache {FORMATS[0]}".encode()
    path.write_bytes(saved.replace(older, f"coldpress cache {FORMATS[-1] + 8}".encode()))
    with pytest.raises(CacheError, match=rf"is of format {FORMATS[-1] + 8}, and coldpress .* reads 1 to {FORMATS[-1]}"):
        PressedCache.load(path, tiny("llama"))


# -- other models -----------------------------------------------------------------------------------------------------


def test_models_of_another_shape_are_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved)
    for changes, message in (
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2, and here it is 3; load it with the model that made it"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2, and here it is 4"),
        ({"hidden_size": 64}, "hidden_size is 32, and here it is 64"),
        ({"head_dim": 16}, "head_dim is 8, and here it is 16"),
    ):
        for check_model in (True, False):
            with pytest.raises(CacheError, match=f"is of another model: its {message}"):
                PressedCache.load(path, BY_NAME["llama"].build(**changes), check_model=check_model)
    with pytest.raises(CacheError, match=r"model in float32, and this one is in bfloat16; .* dtype=torch.float32"):
        PressedCache.load(path, tiny("llama", dtype=torch.bfloat16))


def test_models_of_the_same_shape_are_refused_unless_one_is_sure(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved)
    tuned = BY_NAME["llama"].build()
    tuned.model.layers[1].self_attn.k_proj.weight[0, 3] += 0.01
    others = {
        "with the same sizes and other weights: load it with the model and revision": tuned,
        "its model_type is llama, and here it is qwen2": tiny("qwen2"),
        "its rope is .*default.* and here it is .*linear": tiny("llama_linear"),
        "its vocab_size is 97, and here it is 98": BY_NAME["llama"].build(vocab_size=98),
    }
    for message, model in others.items():
        with pytest.raises(CacheError, match=f"{message}.*check_model=False"):
            PressedCache.load(path, model)
        assert PressedCache.load(path, model, check_model=False).seen_tokens == 20


def test_a_model_is_known_whatever_its_weights_are_called_and_where_they_are(saved: bytes, tmp_path: Path) -> None:
    """Versions of transformers name the same weights differently: GPT-NeoX's head, for one."""
    path, model = tmp_path / "a.safetensors", BY_NAME["llama"].build()
    path.write_bytes(saved)
    model.model.renamed = model.model.norm
    model.model.norm = torch.nn.Identity()
    assert PressedCache.load(path, model).seen_tokens == 20
    model.lm_head = model.lm_head.to("meta")  # as what is loaded only when it is needed
    with pytest.raises(CacheError, match="other weights"):
        PressedCache.load(path, model)


def test_the_model_is_named(tmp_path: Path) -> None:
    model = BY_NAME["llama"].build()
    model.config._name_or_path = "some/model"
    prefilled(None, model).save(tmp_path / "a.safetensors", model)
    with pytest.raises(CacheError, match=r"is of another model \(some/model\): its"):
        PressedCache.load(tmp_path / "a.safetensors", tiny("gpt_neox"))


# -- what cannot be saved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STATES if name in BY_NAME])
def test_recurrent_states_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds states beside keys and values"):
        prefilled(KnormPress(0.5), tiny(name)).save(tmp_path / "a.safetensors", tiny(name))
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_empty_broken_or_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CacheError, match="holds no tokens"):
        PressedCache().save(path, tiny("llama"))
    with pytest.raises(CacheError, match="has 4 layers and the model 2"):
        prefilled(None, tiny("gemma3")).save(path, tiny("llama"))
    broken = prefilled()
    broken.session.error = PressError("no")
    with pytest.raises(PressError, match="no"):
        broken.save(path, tiny("llama"))
    half, stuck = prefilled(), tiny("llama").model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go_on(half)
    stuck.remove()
    with pytest.raises(CacheError, match="failed half-way"):
        half.save(path, tiny("llama"))
    assert not list(tmp_path.iterdir())


# -- presses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(KnormPress):
    """A press with a parameter that JSON does not hold."""

    extra: object = None

    def score(self, view: LayerView) -> Tensor:
        return super().score(view)


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", [*press_names(), *SCHEDULES])
def test_presses_come_back_from_json(name: str) -> None:
    press = SCHEDULES[name] if name in SCHEDULES else small_press(name, "llama") if name in OTHERS else None
    press = press or press_of(name, 0.5 if name in press_names(has_ratio=True) else 0.0)
    assert from_data(json.loads(json.dumps(as_data(press)))) == press


def test_a_press_that_has_done_its_work_need_not_come_back(tmp_path: Path) -> None:
    past = prefilled(Odd(0.5, extra=object()))
    loaded = through_a_file(past, tmp_path / "a.safetensors")
    assert loaded.press is None and loaded.achieved_ratio() == past.achieved_ratio()
    assert torch.equal(go_on(loaded), go_on(past))
    mine = Odd(0.5, extra=3)
    assert through_a_file(prefilled(mine), tmp_path / "a.safetensors").press == mine


def test_a_press_that_goes_on_has_to_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CacheError, match=r"goes on while decoding, and cannot be saved: Odd has a parameter.* object"):
        prefilled(DecodingPress(Odd(extra=object()), 5, 20)).save(path, tiny("llama"))
    prefilled(DecodingPress(Odd(extra=1), 5, 20)).save(path, tiny("llama"))
    Odd.__qualname__ = "Gone"  # as in a process that has not imported it
    try:
        with pytest.raises(CacheError, match=r"compressed by DecodingPress.*no press .*:Odd here; import the module"):
            PressedCache.load(path, tiny("llama"))
    finally:
        Odd.__qualname__ = "Odd"


def test_a_file_made_by_hand_runs_nothing(tmp_path: Path) -> None:
    for name in ("os:system", "builtins:eval", "coldpress.cache.file:load_cache", "coldpress.core.view:LayerView"):
        with pytest.raises(PressError, match="There is no press"):
            from_data({"class": name, "parameters": {}})
    with pytest.raises(PressError, match="does not take the parameters"):
        from_data(as_data(KnormPress(0.5)) | {"parameters": {"other": 1}})
