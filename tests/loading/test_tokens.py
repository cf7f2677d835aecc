"""Every byte of a text belongs to one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from coldpress.loading.datasets import Corpus, Document
from coldpress.loading.tokens import encode, tokenize
from coldpress.records.metrics import bits_per_byte

SAMPLE = ["The miller weighed the olives, naïve é 油 🫒🫒 and so on.\n\n = A = \n"] * 9
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.text("aé油🫒\u0301\u200d \n\tÅ", max_size=30)


def byte_level(trim_offsets: bool, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, in which rare characters are cut up into bytes, as GPT-2's and Pythia's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def words() -> PreTrainedTokenizerFast:
    """Lower-case words: blanks are dropped, accents and control characters too."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "miller": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PLAIN = byte_level(trim_offsets=False)
TOKENIZERS = (PLAIN, byte_level(trim_offsets=True), byte_level(True, normalizers.NFC()), words())


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte_level", "trimmed", "nfc", "words"])
@given(TEXTS)
@example("")
@example(" ")
@example("  a  ")
@example("油🫒")
@example("e\u0301 a")
def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids, n_bytes = encode(tokenizer, text)
    assert n_bytes is None or n_bytes.dtype == torch.int64
    if len(ids) == 0:  # all of it was dropped
        assert n_bytes is not None and n_bytes.tolist() == []
        return
    assert n_bytes is not None and len(n_bytes) == len(ids)
    assert int(n_bytes.sum()) == len(text.encode())
    assert int(n_bytes.min()) >= 0


@pytest.mark.parametrize("tokenizer", TOKENIZERS[:2], ids=["byte_level", "trimmed"])
@given(TEXTS)
def test_up_to_the_end_of_a_character_they_are_those_that_the_tokens_spell(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    """In a byte-level vocabulary a token has as many characters as it stands for bytes; blanks may go one token on."""
    ids, n_bytes = encode(tokenizer, text)
    if len(ids) == 0:
        return
    assert n_bytes is not None
    spelled = [len(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    ends, at = set(), 0  # where characters end, in bytes
    for character in text:
        at += len(character.encode())
        ends.add(at)
    exact, ours = 0, 0
    for mine, own in zip(n_bytes.tolist(), spelled, strict=True):
        exact, ours = exact + own, ours + mine
        blanks = len(text.encode()[:exact]) - len(text.encode()[:exact].rstrip(b" "))
        if exact in ends:
            assert exact - blanks <= ours <= exact
            assert tokenizer is not PLAIN or ours == exact


def test_a_character_in_several_tokens_belongs_to_the_first() -> None:
    _, n_bytes = encode(PLAIN, "a𝄞b")
    assert n_bytes is not None and n_bytes.tolist() == [1, 4, 0, 0, 0, 1]


def test_special_tokens_have_no_bytes() -> None:
    tokenizer = byte_level(trim_offsets=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    ids, n_bytes = encode(tokenizer, "zq ", special_tokens=True)
    assert n_bytes is not None
    assert (int(ids[0]), int(ids[-1])) == (0, 0) and n_bytes.tolist() == [0, 1, 1, 1, 0]
    assert encode(tokenizer, "", special_tokens=True)[1] is not None


class Slow:
    """Says nothing of where its tokens stand."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class Lost(Slow):
    """Calls itself fast, and says that all its tokens stand at the beginning."""

    is_fast = True

    def __call__(self, text: str, return_offsets_mapping: bool = False, **options: bool) -> dict[str, list[Any]]:
        return {"input_ids": [ord(character) for character in text], "offset_mapping": [(0, 0)] * len(text)}


@pytest.mark.parametrize("tokenizer", [Slow(), Lost()])
def test_a_tokenizer_that_does_not_say_where(tokenizer: Any) -> None:
    ids, n_bytes = encode(tokenizer, "abc")
    assert ids.tolist() == [97, 98, 99] and n_bytes is None
    corpus = Corpus("c", "c", None, "test", None, (Document("d", "abc"),))
    assert tokenize(corpus, tokenizer, 2)[0].n_bytes is None


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * 0.6931471805599453, 4) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 0) is None
