"""Each preset is what other people's program computes: written out anew here, with transformers' own attention."""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Fast

import coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import DataError, InputError
from coldpress.eval.evaluate import plain_perplexity
from coldpress.eval.options import PPL_PRESETS
from coldpress.eval.plan import Plan, make_plan
from coldpress.eval.settings import Settings
from coldpress.eval.windows import PRESETS, detokenised, laid_out, pages, wiki_raw
from coldpress.loading.datasets import Corpus, Document, load_corpus

POSITIONS = 128
DEMO = Path(coldpress.__file__).parent / "assets" / "demo"
ROWS = (
    "",
    " = The Olive Press = \n",
    "",
    " The press stood in the corner of the old mill , and 1 @,@ 500 people came @-@ it is said @-@ every autumn . \n",
    ' " Come in ! " said the miller ( who was kind ) ; the farmers \' carts were full : it was 21 ° C . \n',
    "",
    " = = History = = \n",
    "",
    *(f" In 18{i:02} the mill 's owner pressed {i} @.@ 5 tons [ as written ] and sold them . \n" for i in range(40)),
    " = = = Owners = = = \n",
    " Theophrastus wrote of trees , their growth , and what animals do with their fruits . É, 油, 🫒 . \n",
    "",
    " = Kiss You ( song ) = \n",
    "",
    *(f" The song was number {i} in week {i * 7} ; did anybody listen ? Yes , everybody did . \n" for i in range(30)),
    " = Short = \n",
    "",
)  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random weights on coldpress's attention, and on transformers' own."""
    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=POSITIONS, rotary_pct=0.25, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    made = []
    for attention in ("coldpress", "sdpa"):
        torch.manual_seed(0)
        made.append(GPTNeoXForCausalLM._from_config(config, attn_implementation=attention).eval())
    return made[0], made[1]


def tokenizer_of(adds_bos: bool) -> Any:
    """The demo's tokenizer, as it is or putting its first token before each text, as Llama's does."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
        )
    return tokenizer


def corpus() -> Corpus:
    whole = Document(f"rows 0-{len(ROWS) - 1}", "\n\n".join(ROWS))
    return Corpus("wikitext", "w", None, "test", '"\\n\\n".join(all rows)', (whole,), ROWS)


def planned(preset: str, tokenizer: Any, source: Corpus | None = None, **settings: Any) -> Plan:
    asked = Settings(model="m", ppl_preset=preset, **settings)
    return make_plan(asked, laid_out(source or corpus(), preset), tokenizer, POSITIONS)


def measured(model: PreTrainedModel, plan: Plan, batch_size: int = 1) -> dict[str, Any]:
    assert plan.max_length is not None and plan.stride is not None
    return plain_perplexity(
        model, plan.documents, max_length=plan.max_length, stride=plan.stride, preset=plan.preset,
        token_bytes=plan.token_bytes, units=plan.units, batch_size=batch_size,
    )  # fmt: skip


# -- hf-strided: the loop of transformers' documentation ----------------------------------------------------------


@torch.no_grad()
def of_the_documentation(model: PreTrainedModel, ids: Tensor, length: int, stride: int) -> tuple[float, int]:
    """With labels of -100 and the model's own loss; a window weighs as much as it has labels with a predecessor."""
    nll, n_tokens, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, : -(end - previous_end)] = -100
        n_valid = int((target_ids[:, 1:] != -100).sum())
        nll += float(model(input_ids, labels=target_ids).loss) * n_valid
        n_tokens += n_valid
        previous_end = end
        if end == ids.shape[1]:
            break
    return nll, n_tokens


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("length", [None, 64])
def test_hf_strided(models: tuple[PreTrainedModel, PreTrainedModel], adds_bos: bool, length: int | None) -> None:
    tokenizer = tokenizer_of(adds_bos)
    ids = tokenizer("\n\n".join(ROWS), return_tensors="pt", verbose=False).input_ids
    size = length or POSITIONS
    nll, n_tokens = of_the_documentation(models[1], ids, size, size // 4)
    plan = planned("hf-strided", tokenizer, max_length=length)
    result = measured(models[0], plan)
    assert plan.protocol == f"hf-strided-L{size}-S{size // 4}-v1"
    assert plan.add_bos is adds_bos
    assert result["scored_tokens"] == n_tokens == ids.shape[1] - 1
    assert result["ppl"] == pytest.approx(math.exp(nll / n_tokens), rel=1e-5)
    assert result["scored_bytes"] == pytest.approx(len("\n\n".join(ROWS).encode()), abs=0 if adds_bos else 8)
    assert result["bits_per_byte"] == pytest.approx(nll / result["scored_bytes"] / math.log(2), rel=1e-5)


# -- gptq: its loop over disjoint chunks --------------------------------------------------------------------------


@torch.no_grad()
def of_gptq(model: PreTrainedModel, ids: Tensor, length: int) -> tuple[float, int]:
    """Perplexity and the number of chunks: the mean loss of each, times its length, over all lengths."""
    loss_function = torch.nn.CrossEntropyLoss()
    n_chunks = ids.numel() // length
    sums = []
    for i in range(n_chunks):
        chunk = ids[:, i * length : (i + 1) * length]
        logits = model(chunk).logits[:, :-1, :].contiguous().float()
        sums.append(loss_function(logits.view(-1, logits.size(-1)), chunk[:, 1:].reshape(-1)) * length)
    return float(torch.exp(torch.stack(sums).sum() / (n_chunks * length))), n_chunks


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_gptq(models: tuple[PreTrainedModel, PreTrainedModel], adds_bos: bool, batch_size: int) -> None:
    tokenizer = tokenizer_of(adds_bos)
    ids = tokenizer("\n\n".join(ROWS), return_tensors="pt", verbose=False).input_ids
    ppl, n_chunks = of_gptq(models[1], ids, POSITIONS)
    plan = planned("gptq", tokenizer)
    result = measured(models[0], plan, batch_size)
    assert plan.protocol == "gptq-L128-v1"
    assert (result["windows"], result["scored_tokens"]) == (n_chunks, n_chunks * 127)
    assert n_chunks * POSITIONS < ids.shape[1]  # or nothing would be left out
    assert result["ppl"] == pytest.approx(ppl, rel=1e-5)


# -- llamacpp: one token after the other --------------------------------------------------------------------------


@torch.no_grad()
def of_llamacpp(model: PreTrainedModel, tokens: list[int], n_ctx: int, bos: int | None) -> tuple[list[float], int]:
    """Negative log-likelihoods in the order of the text, and the number of chunks."""
    tokens = tokens if bos is None else [bos, *tokens]
    found, n_chunks, first = [], len(tokens) // n_ctx, n_ctx // 2
    for i in range(n_chunks):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        if bos is not None:
            chunk[0] = bos
        cache = DynamicCache()
        for j, token in enumerate(chunk[:-1]):
            logits = model(torch.tensor([[token]]), **cache_argument(cache)).logits[0, -1].double()
            if j >= first:
                found.append(float(logits.logsumexp(0) - logits[chunk[j + 1]]))
    return found, n_chunks


@pytest.mark.slow
@pytest.mark.parametrize("adds_bos", [False, True])
def test_llamacpp(models: tuple[PreTrainedModel, PreTrainedModel], adds_bos: bool) -> None:
    tokenizer = tokenizer_of(adds_bos)
    text = "".join(" \n" if row == "" else row for row in ROWS)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    losses, n_chunks = of_llamacpp(models[1], tokens, 64, tokenizer.bos_token_id if adds_bos else None)
    plan = planned("llamacpp", tokenizer, max_length=64)
    result = measured(models[0], plan)
    assert plan.protocol == "llamacpp-n64-v1"
    assert (result["windows"], result["scored_tokens"]) == (n_chunks, n_chunks * 31)
    assert result["ppl"] == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    # What is printed after +/-: from sums of losses and of their squares.
    mean, square = math.fsum(losses) / len(losses), math.fsum(v * v for v in losses) / len(losses)
    se = math.sqrt((square - mean**2) / (len(losses) - 1))
    assert result["ppl_se"] == pytest.approx(se * math.exp(mean), rel=1e-4)
    assert bool((plan.documents[0][::64] == 0).all()) is adds_bos
    assert plan.total_tokens == len(tokens) + adds_bos


def test_llamacpp_scores_255_of_512_and_needs_two_chunks() -> None:
    assert [(w.begin, w.end, w.n_scored) for w in PRESETS["llamacpp"].windows(1100, 512, 512)] == [
        (0, 512, 255),
        (512, 1024, 255),
    ]
    assert PRESETS["llamacpp"].windows(1023, 512, 512) == []
    with pytest.raises(DataError, match=r"--ppl_preset llamacpp needs 256\. Use a longer text, or a smaller"):
        planned("llamacpp", tokenizer_of(False), limit_tokens=255)


# -- lm-eval: its windows, its texts, its units -------------------------------------------------------------------


def rolling(tokens: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation): every token is predicted once; a window's input is never longer than ``length``."""
    stream = [prefix, *tokens]
    found, done = [], 1  # the next token to be predicted
    while done < len(stream):
        end = min(done + length, len(stream))
        begin = done - 1 if end - done == length or done == 1 else end - 1 - length
        found.append((stream[begin:done], stream[done:end]))
        done = end
    return found


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: list[int], continuation: list[int]) -> float:
    """As HFLM: the last len(continuation) logits of context + continuation[:-1]."""
    inputs = torch.tensor([context + continuation[:-1]])
    assert inputs.shape[1] <= POSITIONS
    log_probs = model(inputs).logits[0, -len(continuation) :].double().log_softmax(-1)
    return float(log_probs[range(len(continuation)), continuation].sum())


@pytest.mark.parametrize("length", [None, 50])
def test_lm_eval(models: tuple[PreTrainedModel, PreTrainedModel], length: int | None) -> None:
    tokenizer = tokenizer_of(False)
    raw = "".join(" \n" if row == "" else row for row in ROWS).split("\n")
    starts = [i for i, line in enumerate(raw) if re.fullmatch(r" = [^=].* = ", line)]
    articles = ["\n".join(raw[a:b]) for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]
    assert len(articles) == 3
    total = 0.0
    for article in articles:
        tokens = tokenizer(detokenised(article), verbose=False)["input_ids"]
        for context, continuation in rolling(tokens, tokenizer.bos_token_id, length or POSITIONS):
            total += log_likelihood(models[1], context, continuation)
    n_words = sum(len(re.split(r"\s+", article)) for article in articles)
    n_bytes = sum(len(article.encode()) for article in articles)
    plan = planned("lm-eval", tokenizer, max_length=length)
    result = measured(models[0], plan)
    assert plan.protocol == f"lm-eval-L{length or POSITIONS}-v1"
    assert plan.doc_ids == ("0 The Olive Press", "1 Kiss You ( song )", "2 Short")
    assert result["scored_tokens"] == plan.total_tokens == sum(len(ids) - 1 for ids in plan.documents)
    assert (result["scored_words"], result["scored_bytes"]) == (n_words, n_bytes)
    assert math.log(result["word_perplexity"]) == pytest.approx(-total / n_words, rel=1e-5)
    assert math.log(result["byte_perplexity"]) == pytest.approx(-total / n_bytes, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(-total / n_bytes / math.log(2), rel=1e-5)
    assert result["ppl_bootstrap_ci95"][0] < result["ppl"] < result["ppl_bootstrap_ci95"][1]


def windows_of(n_tokens: int, length: int) -> list[tuple[list[int], list[int]]]:
    """What our windows feed in and score, as (context, continuation), of tokens 1 to n after a prefix 0."""
    stream = list(range(n_tokens + 1))
    cut = PRESETS["lm-eval"].windows(n_tokens + 1, length, length)
    return [(stream[w.begin : w.first_scored], stream[w.first_scored : w.end]) for w in cut]


@given(st.integers(1, 60), st.integers(1, 20))
def test_rolling_windows_score_every_token_once(n_tokens: int, length: int) -> None:
    assert windows_of(n_tokens, length) == rolling(list(range(1, n_tokens + 1)), 0, length)


def test_rolling_windows_are_those_of_lm_eval() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for n_tokens in range(1, 60):
        for length in (1, 2, 7, 20, 59, 60):
            theirs = utils.get_rolling_token_windows(list(range(1, n_tokens + 1)), 0, length, 1)
            assert windows_of(n_tokens, length) == [utils.make_disjoint_window(pair) for pair in theirs]


def test_texts_and_units_are_those_of_lm_eval() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    plan = planned("lm-eval", tokenizer_of(False))
    articles = pages(wiki_raw(ROWS))
    odd = [
        "",
        "( )",
        "a ( b ( c ) d )",
        "' x ' s ' y '",
        "/' 5/ / ' 5 /",
        "= = = = A = = = =",
        ' " a " " b ',
        "{ a }[ b ]",
    ]
    for page in [*articles, *odd, *(row * 2 for row in ROWS)]:
        assert detokenised(page) == theirs.wikitext_detokenizer({"page": page})
    results = [theirs.process_results({"page": page}, (-1.0,)) for page in articles]
    assert plan.units == tuple((r["word_perplexity"][1], r["byte_perplexity"][1]) for r in results)


def test_a_page_is_an_article() -> None:
    assert pages(" \n = A = \n \n text \n = = B = = \n = = = C = = = \n = D = \n x") == [
        " = A = \n \n text \n = = B = = \n = = = C = = = ",
        " = D = \n x",
    ]
    assert pages("before \n = A = ") == ["before ", " = A = "]
    assert pages(" = 1 = 2 = \n") == [" = 1 = 2 = \n"]


def test_detokenised_text_reads_as_it_was_written() -> None:
    page = (
        ' = A = \n \n It cost 1 @,@ 500 ( in all ) , the " old " mill \'s share @-@ or N times [ x ] ; ok ? 21 ° C \n'
    )
    assert detokenised(page) == ' = A =\n\nIt cost 1,500 (in all), the "old" mill\'s share-or 1 times [x]; ok? 21°C\n'


def test_lm_eval_takes_whole_documents() -> None:
    tokenizer = tokenizer_of(False)
    sizes = [len(ids) - 1 for ids in planned("lm-eval", tokenizer).documents]
    plan = planned("lm-eval", tokenizer, limit_tokens=sizes[0] + sizes[1] + 1)
    assert [len(ids) - 1 for ids in plan.documents] == sizes[:2]
    assert plan.units is not None and len(plan.units) == 2
    with pytest.raises(DataError, match=f"whole documents, and the first has {sizes[0]} tokens"):
        planned("lm-eval", tokenizer, limit_tokens=sizes[0] - 1)


def test_lm_eval_begins_with_bos_or_eos() -> None:
    tokenizer = tokenizer_of(False)
    for eos, bos, first in ((5, 7, 7), (5, None, 5)):
        tokenizer.bos_token = None if bos is None else tokenizer.convert_ids_to_tokens(bos)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
        assert {int(ids[0]) for ids in planned("lm-eval", tokenizer).documents} == {first}
    bare = Fast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="BOS or EOS token; it has neither"):
        planned("lm-eval", bare)


# -- all of them --------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_options() -> None:
    assert tuple(PRESETS) == PPL_PRESETS


def test_models_of_few_positions_are_said_to_be() -> None:
    (note,) = planned("hf-strided", tokenizer_of(False)).notes[1:]
    assert note.startswith("--ppl_preset hf-strided usually has windows of 2048 tokens; here they have 128")
    long = Corpus("c", "c", None, "test", None, (Document("d", "a " * 9000),), ("",))
    plan = make_plan(Settings(ppl_preset="gptq"), long, tokenizer_of(False), 4096)
    assert (plan.protocol, plan.notes) == ("gptq-L2048-v1", ())
    for length in (2048, 1024):
        asked = Settings(ppl_preset="hf-strided", max_length=length)
        assert make_plan(asked, long, tokenizer_of(False), 4096).stride == 512


def test_other_texts_are_taken_as_they_are(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    texts = ("The miller weighed the olives . " * 60, "Short .", "Another book begins ( here ) . " * 60)
    books = Corpus("c", "c", None, "test", None, tuple(Document(f"d{i}", text) for i, text in enumerate(texts)))
    tokenizer = tokenizer_of(False)
    plan = planned("gptq", tokenizer, books)
    assert plan.doc_ids == ("d0", "d2") and laid_out(books, "lm-eval") is books
    assert "each document by itself" in plan.notes[-2] and "1 document(s) too short" in plan.notes[-1]
    parts = [of_gptq(models[1], ids[None], POSITIONS) for ids in plan.documents]
    mean = sum(math.log(ppl) * n for ppl, n in parts) / sum(n for _, n in parts)
    assert measured(models[0], plan)["ppl"] == pytest.approx(math.exp(mean), rel=1e-5)
    plan = planned("lm-eval", tokenizer, books)
    assert plan.doc_ids == ("d0", "d1", "d2") and "does not detokenise" in plan.notes[-1]
    assert plan.units is not None and plan.units[1] == (2, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"press": ("snapkv",)}, "the uncompressed model's perplexity.*leave --press snapkv out"),
        ({"ppl_apply_press": True}, "leave --ppl_apply_press out"),
        ({"ppl_mode": "streaming"}, "leave --ppl_mode out"),
        ({"kv_bits": (4,)}, "leave --kv_bits out"),
        ({"stride": 64}, "says how windows lie; leave --stride out"),
        ({"context_tokens": 64}, "leave --context_tokens out"),
        ({"speed_only": True}, "measures no speed; leave --speed_only out"),
        ({"compile": True}, "measures no speed; leave --compile out"),
        ({"ppl_preset": "hf"}, "must be one of hf-strided, gptq, llamacpp, lm-eval, got 'hf'"),
    ],
)
def test_what_a_preset_cannot_go_with(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**{"ppl_preset": "gptq", **settings})


@pytest.mark.parametrize(("preset", "length", "message"), [("gptq", 1, "at least 2"), ("llamacpp", 3, "at least 4")])
def test_windows_too_short_to_score(preset: str, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(preset, tokenizer_of(False), max_length=length)


# COLDPRESS_WIKITEXT=folder with WikiText, COLDPRESS_PYTHIA_TOKENIZER=folder with Pythia's tokenizer:
# what the presets make of the whole test split of WikiText-2.


@pytest.mark.skipif("COLDPRESS_WIKITEXT" not in os.environ, reason="COLDPRESS_WIKITEXT names no folder with WikiText")
def test_wikitext_2_is_cut_as_others_count_it() -> None:
    found = load_corpus(os.environ["COLDPRESS_WIKITEXT"])
    assert found.rows is not None
    raw = wiki_raw(found.rows).encode()
    # wiki.test.raw of wikitext-2-raw-v1.zip, as others report it
    assert len(raw) == 1290590
    assert hashlib.sha256(raw).hexdigest() == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    assert len(pages(raw.decode())) == 62
    tokenizer = AutoTokenizer.from_pretrained(os.environ["COLDPRESS_PYTHIA_TOKENIZER"])
    counts = {"hf-strided": (288730, 288729), "gptq": (288730, 286580), "llamacpp": (287159, 142800)}
    for preset, (n_tokens, n_scored) in counts.items():
        plan = make_plan(Settings(ppl_preset=preset), laid_out(found, preset), tokenizer, 2048)
        scored = sum(w.n_scored for w in PRESETS[preset].windows(n_tokens, plan.max_length or 0, plan.stride or 0))
        assert (plan.total_tokens, scored) == (n_tokens, n_scored)
    for join, n_tokens in (("\n", 287151), ("", 285831)):
        assert len(tokenizer(join.join(found.rows), verbose=False)["input_ids"]) == n_tokens
