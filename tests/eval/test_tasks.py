"""Generated tasks: exact lengths, answers where they should be, and nothing but the seed behind them."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from coldpress.errors import DataError, InputError
from coldpress.eval.material import ADJECTIVES, NOUNS, SENTENCES, Material
from coldpress.eval.tasks import Example, find_task, make_example, make_examples, register, task_names
from coldpress.loading.models import load_model

DEPTHS = (0.0, 0.3, 1.0)
TEXT = "It was late. The mill stood still, and nobody came! Who could say why? A cart went by. Then it rained. " + (
    "They had waited for the carrier since noon, without a word from anybody. The lamps were lit one after the other; "
    "the smell of wet wool and tar filled the house. Was it Monday already? In the yard the hens had gone to sleep."
)
PROBES = ("passkey", "repeat", "repeat_text")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("demo").tokenizer


@pytest.fixture(scope="module")
def material(tokenizer: Any) -> Material:
    return Material(tokenizer)


def text_of(material: Material, ids: tuple[int, ...]) -> str:
    return str(material.tokenizer.decode(ids))


@pytest.mark.parametrize("name", task_names())
def test_a_context_has_exactly_the_tokens_that_were_asked_for(tokenizer: Any, name: str) -> None:
    for material in (Material(tokenizer), Material(tokenizer, TEXT)):
        for length in (150, 151, 400):
            examples = make_examples(material, [name], [length], DEPTHS, 6)
            assert [len(example.context_ids) for example in examples] == [length] * 6
            assert all(example.question_ids and example.answer_ids for example in examples)
            assert [example.index for example in examples] == list(range(6))


@pytest.mark.parametrize("name", [name for name in task_names() if find_task(name).has_depth])
def test_the_answer_stands_at_its_depth(material: Material, name: str) -> None:
    for example in make_examples(material, [name], [500], DEPTHS, 6):
        context = text_of(material, example.context_ids)
        answer = text_of(material, example.answer_ids)
        assert context.count(answer) == (2 if name == "passkey" else 1)
        # what is hidden first of all that is hidden at this depth
        at = len(material.ids(" " + context[: context.index(answer)]))
        length = 500 if example.depth == 1 else 500 - len(example.answer_ids)
        assert example.depth is not None
        assert at / length == pytest.approx(example.depth, abs=0.15)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_hidden_part_is_between_the_two_sentences_nearest_to_its_depth(material: Material, depth: float) -> None:
    (example,) = make_examples(material, ["niah_single"], [600], [depth], 1)
    ((start, stop),) = example.hidden_at
    hidden = text_of(material, example.context_ids[start:stop])
    assert re.fullmatch(r" One of the special magic numbers for [a-z]+-[a-z]+ is: \d{7}\.", hidden)
    assert example.references[0] in hidden
    head = len(
        material.begin(
            "Special magic numbers are hidden in the following text. Memorise them; you will be asked "
            "about one of them.\n"
        )
    )
    filler = 600 - head - (stop - start)
    longest = max(len(material.ids(f" {sentence}")) for sentence in SENTENCES)
    assert abs(start - head - depth * filler) <= longest / 2
    if depth in (0.0, 1.0):
        assert start == head + depth * filler


def test_the_words_stay_whole_around_what_is_hidden(material: Material) -> None:
    """Only the first sentence is cut; all others stand in the context as they are."""
    (example,) = make_examples(material, ["niah_single"], [300], [0.5], 1)
    ((start, stop),) = example.hidden_at
    body = text_of(material, example.context_ids[:start] + example.context_ids[stop:]).partition("\n")[2]
    for sentence in SENTENCES:
        body = body.replace(sentence, "")
    assert len(body.split()) < 20  # what is left of the first one
    assert not any(part.strip() for part in body.split(".")[1:])


def test_of_several_keys_the_one_at_the_depth_is_asked_for(material: Material) -> None:
    for example in make_examples(material, ["niah_multikey"], [600], [0.0, 1.0], 4):
        context, question = (text_of(material, ids) for ids in (example.context_ids, example.question_ids))
        pairs = re.findall(r"numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", context)
        assert len(pairs) == 4 == len(dict(pairs)) == len({number for _, number in pairs})
        key, number = pairs[0 if example.depth == 0 else -1]
        assert question.count(key) == 2
        assert example.references == (number,)
        assert text_of(material, example.answer_ids) == f" {number}"


def test_a_chain_of_variables_leads_to_the_value(material: Material) -> None:
    for example in make_examples(material, ["vt"], [500], [0.5], 5):
        context, question = (text_of(material, ids) for ids in (example.context_ids, example.question_ids))
        value: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?([A-Z]{3}|\d{5})\.", context):
            value[name] = value.get(source, source)  # each is assigned after the one it is taken from
        assert example.references == tuple(value)
        assert len(value) == 5
        assert len(set(value.values())) == 1
        assert f"value {next(iter(value.values()))} " in question
        assert example.depth is None
        assert text_of(material, example.answer_ids) == " " + ", VAR ".join(value)


@pytest.mark.parametrize("length", [150, 700])
def test_the_common_words_are_the_most_common(material: Material, length: int) -> None:
    for example in make_examples(material, ["cwe"], [length], [0.5], 5):
        listed = text_of(material, example.context_ids).partition("\n")[2]
        counts = Counter(re.findall(r"[a-z]+", listed)).most_common()
        assert {word for word, _ in counts[:3]} == set(example.references)
        assert counts[2][1] > counts[3][1]


def test_a_repeated_span_is_asked_for_by_its_beginning(material: Material) -> None:
    for name in ("repeat", "repeat_text"):
        for example in make_examples(material, [name], [300], DEPTHS, 3):
            ((start, stop),) = example.hidden_at
            assert example.context_ids[start:stop] == example.question_ids + example.answer_ids
            assert (len(example.question_ids), len(example.answer_ids)) == (8, 32)
            assert not set(example.question_ids + example.answer_ids) & set(material.tokenizer.all_special_ids)


def test_an_example_depends_on_its_seed_and_its_place_alone(tokenizer: Any) -> None:
    def made(tasks: list[str], n: int, seed: int) -> dict[tuple[str, int, int], Example]:
        examples = make_examples(Material(tokenizer), tasks, [200, 300], DEPTHS, n, seed)
        return {(example.task, example.length, example.index): example for example in examples}

    many, few = made(task_names(), 4, 7), made(["vt", "passkey"], 2, 7)
    assert all(many[key] == example for key, example in few.items())
    assert len({example.fingerprint for example in many.values()}) == len(many) == len(task_names()) * 2 * 4
    others = made(["vt", "passkey"], 2, 8)
    assert not {example.fingerprint for example in others.values()} & {e.fingerprint for e in few.values()}


def test_a_text_is_read_from_somewhere_on_in_its_order(tokenizer: Any) -> None:
    material = Material(tokenizer, TEXT)
    stream = material.pieces(random.Random(0))
    start = material.sentences.index(next(stream).strip())
    rest = [next(stream).strip() for _ in range(len(material.sentences) - 1)]
    assert rest == material.sentences[start + 1 :] + material.sentences[:start]
    assert "Who could say why?" in material.sentences
    with pytest.raises(DataError, match="fewer than two sentences"):
        Material(tokenizer, "Only this")
    with pytest.raises(DataError, match="too short to hide a passage"):
        make_examples(Material(tokenizer, "One. Two."), ["repeat_text"], [200], [0.5], 1)


def test_a_chat_template_goes_around_the_context_and_the_question(tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        Material(tokenizer, is_chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</turn>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    material = Material(tokenizer, is_chat=True)
    (example,) = make_examples(material, ["passkey"], [200], [0.5], 1)
    assert len(example.context_ids) == 200
    assert text_of(material, example.context_ids).startswith("<user>A pass key")
    assert text_of(material, example.question_ids) == "\nWhat is the pass key?</turn><assistant>The pass key is"
    (example,) = make_examples(material, ["repeat"], [200], [0.5], 1)
    assert "<user>" not in text_of(material, example.context_ids)


def test_what_a_tokenizer_puts_before_every_text_is_counted(tokenizer: Any) -> None:
    class WithStart:
        """A tokenizer that begins every text with its first token."""

        all_special_ids, added_tokens_decoder = (0,), {}

        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

        def __len__(self) -> int:
            return len(tokenizer)

    for name in ("repeat", "niah_single"):
        (example,) = make_examples(Material(WithStart()), [name], [200], [0.5], 1)
        assert example.context_ids[0] == 0
        assert 0 not in (*example.context_ids[1:], *example.question_ids, *example.answer_ids)
        assert len(example.context_ids) == 200


def test_tokens_of_pieces_are_those_of_the_whole_text(material: Material) -> None:
    """Tokenised piece by piece, as a reader who saw the whole text would have it."""
    (example,) = make_examples(material, ["niah_multikey"], [400], [0.5], 1)
    ids = example.context_ids + example.question_ids + example.answer_ids
    text = text_of(material, ids)
    assert tuple(material.tokenizer(text, add_special_tokens=False)["input_ids"]) == ids


def test_what_cannot_be_made_is_refused(material: Material) -> None:
    with pytest.raises(InputError, match=r"Unknown task 'niah_singel'; allowed: cwe, .* Did you mean 'niah_single'"):
        make_examples(material, ["niah_singel"], [200], [0.5], 1)
    with pytest.raises(InputError, match="--depths must be numbers from 0"):
        make_examples(material, ["vt"], [200], [1.5], 1)
    with pytest.raises(InputError, match="at least one name"):
        make_examples(material, [], [200], [0.5], 1)
    with pytest.raises(DataError, match="--task_tokens 20 is too short"):
        make_example(find_task("niah_single"), material, 20, 0.5, 0, 0)
    with pytest.raises(ValueError, match="two tasks 'vt'"):
        register("vt", has_depth=False, answer_tokens=1)(find_task("vt").draft)


def test_words_and_sentences_do_not_give_anything_away() -> None:
    for words in (ADJECTIVES, NOUNS, SENTENCES):
        assert len(set(words)) == len(words)
    text = " ".join(SENTENCES).lower()
    assert not set(re.findall(r"[a-z]+", text)) & {*ADJECTIVES, *NOUNS}
    assert not re.search(r"\d", text)


def test_probes_ask_for_no_answer(material: Material) -> None:
    for example in make_examples(material, task_names(), [200], [0.5], 1):
        assert (example.references == ()) == (example.answer_tokens is None) == (example.task in PROBES)
