"""Prompt and texts as tokens, with the three kinds of tokenizer that students have."""

import itertools

import pytest
from tiny import sentences, tokenizer
from tokenizers import AddedToken

from flipkd_dist.errors import UserError
from flipkd_dist.prompt import (
    ALONE_TEMPLATES,
    TEMPLATES,
    EncodedText,
    PairEncoder,
    TextEncoder,
    answer_ids,
    kept_lengths,
    student_encoder,
)

KINDS = ("wordpiece", "bytelevel", "unigram")
ANSWERS = ["是", "否"]
TIGHT, SPACED = "card{text_a}s{text_b}ed", "do i same ? {text_a} | {text_b} ="


@pytest.fixture(scope="module")
def tokenizers():
    """One of each kind, with the answers in its vocabulary."""
    found = {kind: tokenizer(kind) for kind in KINDS}
    for words in found.values():
        words.add_tokens([AddedToken(answer, normalized=False) for answer in ANSWERS])
    return found


def bare(words, text):
    return words(text, add_special_tokens=False)["input_ids"]


def parts(prompt):
    return prompt.replace("{text_b}", "{text_a}").split("{text_a}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [SPACED, TIGHT, "{text_a}{text_b}"])
def test_spans_hold_the_text_and_nothing_else(tokenizers, kind, prompt):
    words = tokenizers[kind]
    encoder = PairEncoder(words, prompt, ANSWERS, 500)
    texts = sentences(20, seed=2)
    for text_a, text_b in itertools.pairwise(texts):
        pair = encoder.encode(text_a, text_b)
        assert not pair.truncated
        for span, text in ((pair.text_a, text_a), (pair.text_b, text_b)):
            assert pair.ids[span] == bare(words, text)
            assert words.decode(pair.ids[span]).strip() == text
        rest = [pair.ids[: pair.text_a.start], pair.ids[pair.text_a.stop : pair.text_b.start]]
        wanted = [bare(words, part) if part else [] for part in parts(prompt)]
        assert [*rest, pair.ids[pair.text_b.stop :]] == [[], *wanted[1:]]
        assert encoder.prefix[len(encoder.prefix) - len(wanted[0]) :] == wanted[0]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_in_one_go_are_those_one_by_one(tokenizers, kind):
    encoder = PairEncoder(tokenizers[kind], SPACED, ANSWERS, 40)
    texts = [*sentences(30, seed=2, longest=40), "kärte 是 \U0001f4b3", "  card  ", "[CLS] <s> card", "Card\n\tlost"]
    pairs = [*itertools.product(texts[::3], texts[::4]), ("card", "card")]
    expected = [encoder.encode(*pair) for pair in pairs]
    assert encoder.encode_pairs(pairs) == expected and any(pair.truncated for pair in expected)
    assert encoder.encode_pairs([]) == []
    assert encoder.encode("card", "lost my card") == PairEncoder(tokenizers[kind], SPACED, ANSWERS, 40).encode(
        "card", "lost my card"
    )
    with pytest.raises(UserError, match="into no tokens"):
        encoder.encode_pairs([("card", "")])


def test_remembered_texts_are_not_tokenised_again_and_are_forgotten(tokenizers):
    counted = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizers["wordpiece"], name)

        def __call__(self, text, **options):
            counted.append(text)
            return tokenizers["wordpiece"](text, **options)

    encoder = PairEncoder(Counting(), SPACED, ANSWERS, 60)
    counted.clear()
    encoder.encode_pairs([("card", "pin"), ("card", "money"), ("pin", "card")])
    encoder.encode("card", "money")
    assert counted == [["card", "pin", "money"]]
    encoder.remember(["money"])
    encoder.encode("card", "money")
    assert counted[1:] == [["money"], "card"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenising_the_whole_would_blur_the_spans(tokenizers, kind):
    """Merges across the borders are real: the parts are not the tokens of the whole text."""
    words = tokenizers[kind]
    encoder = PairEncoder(words, TIGHT, ANSWERS, 500)
    pair = encoder.encode("lo", "block")
    assert encoder.prefix + pair.ids != encoder.prefix[: -len(bare(words, "card"))] + bare(words, "cardlosblocked")


@pytest.mark.parametrize(("kind", "specials"), [("wordpiece", ["[CLS]"]), ("bytelevel", []), ("unigram", ["<s>"])])
def test_leading_specials_once_and_none_behind(tokenizers, kind, specials):
    words = tokenizers[kind]
    encoder = PairEncoder(words, SPACED, ANSWERS, 500)
    ids = encoder.prefix + encoder.encode("lost card", "open account").ids
    tokens = words.convert_ids_to_tokens(ids)
    assert tokens[: len(specials)] == specials
    assert not {"[CLS]", "[SEP]", "<s>"} & set(tokens[len(specials) :])
    assert PairEncoder(words, "{text_a} {text_b}", ANSWERS, 500).prefix == words.convert_tokens_to_ids(specials)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_over_many_lengths(tokenizers, kind):
    words = tokenizers[kind]
    texts = sentences(14, seed=3, shortest=1, longest=9)
    whole = PairEncoder(words, SPACED, ANSWERS, 500)
    prompt = len(whole.prefix) + len(whole.separator) + len(whole.suffix)
    cut = []
    for max_length in (prompt + room for room in (2, 3, 4, 5, 7, 8, 11, 14, 20, 26, 40, 60)):
        encoder = PairEncoder(words, SPACED, ANSWERS, max_length)
        for text_a, text_b in itertools.product(texts[:7], texts[7:]):
            full, pair = whole.encode(text_a, text_b), encoder.encode(text_a, text_b)
            a, b = pair.ids[pair.text_a], pair.ids[pair.text_b]
            full_a, full_b = full.ids[full.text_a], full.ids[full.text_b]
            assert pair.ids == a + encoder.separator + b + encoder.suffix  # the prompt and the answer's position stay
            assert (encoder.prefix, encoder.separator, encoder.suffix) == (whole.prefix, whole.separator, whole.suffix)
            assert a and b and a == full_a[: len(a)] and b == full_b[: len(b)]
            assert len(encoder.prefix) + len(pair.ids) == min(max_length, len(whole.prefix) + len(full.ids))
            if len(a) < len(full_a):
                assert len(a) >= len(b) - 1  # never the shorter one while the other is longer
            if len(b) < len(full_b):
                assert len(b) >= len(a) - 1
            assert pair.truncated == ((a, b) != (full_a, full_b))
            cut.append(pair.truncated)
    assert 0.1 < sum(cut) / len(cut) < 0.95


def test_kept_lengths_against_one_token_at_a_time():
    for length_a, length_b, room in itertools.product(range(1, 14), range(1, 14), range(2, 24)):
        a, b = length_a, length_b
        while a + b > room:
            if a > b or (a == b and length_a <= length_b):
                a -= 1
            else:
                b -= 1
        assert kept_lengths(length_a, length_b, room) == (a, b)


def test_answers_take_the_form_that_follows_the_prompt(tokenizers):
    """A byte-level word inside a sentence carries its space, and both answers take the same form."""
    words = tokenizer("bytelevel")
    for suffix, expected in (("Reply:", ["ĠYes", "ĠNo"]), ("Reply: ", ["Yes", "No"]), ("", ["ĠYes", "ĠNo"])):
        assert words.convert_ids_to_tokens(answer_ids(words, ["Yes", "No"], suffix)) == expected
    words.add_tokens(["Perhaps"])
    assert words.convert_ids_to_tokens(answer_ids(words, ["Yes", "Perhaps"], "Reply:")) == ["Yes", "Perhaps"]
    lower = tokenizers["wordpiece"]
    assert lower.convert_ids_to_tokens(answer_ids(lower, ["Yes", "No"], "Reply:")) == ["yes", "no"]


@pytest.mark.parametrize("kind", KINDS)
def test_chinese_answers(tokenizers, kind):
    encoder = PairEncoder(tokenizers[kind], "同义吗 {text_a}和{text_b}答=", ANSWERS, 500)
    assert tokenizers[kind].convert_ids_to_tokens(encoder.answer_ids) == ANSWERS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answers", [["错", "对"], ["stolen card", "no card"], ["是", "是"], ["是", "unheardof"]])
def test_answers_that_are_not_two_known_tokens(tokenizers, kind, answers):
    with pytest.raises(UserError, match=r"^student\.answers: must be two different single tokens.*found") as error:
        answer_ids(tokenizers[kind], answers, "=")
    assert "\n" not in str(error.value) and repr(answers[0]) in str(error.value)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_named_templates(tokenizers, name):
    words = tokenizers["bytelevel"]
    encoder = PairEncoder(words, name, ["Yes", "No"], 1000)
    text_a, text_b = "my {text_b} card", 'open "{text_a}"'  # texts may look like the template
    before, between, after = parts(TEMPLATES[name])
    assert (
        words.decode(encoder.prefix + encoder.encode(text_a, text_b).ids) == before + text_a + between + text_b + after
    )
    assert words.convert_ids_to_tokens(encoder.answer_ids) == ["ĠYes", "ĠNo"]


def test_faq_is_the_template_where_none_is_named(tokenizers):
    faq, *others = [PairEncoder(tokenizers["bytelevel"], name, ANSWERS, 1000).prefix for name in ("faq", None, "")]
    assert others == [faq, faq]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("faqs", r"student\.prompt: 'faqs' must hold \{text_a\} exactly once.*faq, finance, medical"),
        ("only {text_a} here", r"student\.prompt: .* must hold \{text_b\} exactly once"),
        ("{text_a} {text_b} {text_a}", r"student\.prompt: .* must hold \{text_a\} exactly once"),
        ("{text_b} before {text_a}", r"student\.prompt: \{text_b\} stands before \{text_a\}"),
    ],
)
def test_prompts_that_cannot_be(tokenizers, prompt, message):
    with pytest.raises(UserError, match=f"^{message}"):
        PairEncoder(tokenizers["wordpiece"], prompt, ANSWERS, 100)


def test_no_room_and_no_tokens(tokenizers):
    words = tokenizers["wordpiece"]
    prompt = 1 + len(bare(words, "do i same ? | ="))
    assert PairEncoder(words, SPACED, ANSWERS, prompt + 2).room == 2
    with pytest.raises(UserError, match=rf"^data\.max_length: {prompt + 1} tokens leave .* a prompt of {prompt}:"):
        PairEncoder(words, SPACED, ANSWERS, prompt + 1)
    with pytest.raises(UserError, match=r"^data: the student's tokenizer turns '\\u200d' into no tokens"):
        PairEncoder(words, SPACED, ANSWERS, 50).encode("lost card", "\u200d")


ALONE = "do i help ? {text} ="


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [ALONE, "card{text}s", "{text}"])
def test_the_span_of_a_text_alone(tokenizers, kind, prompt):
    words = tokenizers[kind]
    encoder, texts = TextEncoder(words, prompt, 500), sentences(20, seed=2)
    before, after = (bare(words, part) if part else [] for part in prompt.split("{text}"))
    for text, encoded in zip(texts, encoder.encode_texts(texts), strict=True):
        assert encoded == encoder.encode(text) and not encoded.truncated
        assert encoded.ids[encoded.text] == bare(words, text) and encoded.ids[encoded.text.stop :] == after
    leading = {"wordpiece": 1, "bytelevel": 0, "unigram": 1}[kind]  # [CLS], nothing, <s>
    assert encoder.prefix[leading:] == before and len(encoder.prefix) == leading + len(before)


def test_a_text_alone_is_cut_at_its_end(tokenizers):
    words = tokenizers["wordpiece"]
    prompt = 1 + len(bare(words, ALONE.replace("{text}", "")))
    encoder, ids = TextEncoder(words, ALONE, prompt + 3), bare(words, "card pin money lost")
    assert encoder.encode("card pin money lost") == EncodedText([*ids[:3], *encoder.suffix], slice(0, 3), True)
    assert len(ids) > 3 and not encoder.encode("card").truncated
    assert TextEncoder(words, ALONE, prompt + 1).room == 1
    with pytest.raises(UserError, match=rf"^data\.max_length: {prompt} tokens leave no room for a text"):
        TextEncoder(words, ALONE, prompt)
    with pytest.raises(UserError, match=r"^data: the student's tokenizer turns '\\u200d' into no tokens"):
        encoder.encode("\u200d")


@pytest.mark.parametrize("prompt", ["faqs", "{text} and {text}", "{text_a} {text_b}"])
def test_prompts_of_texts_alone_that_cannot_be(tokenizers, prompt):
    with pytest.raises(UserError, match=r"^student\.prompt: .* exactly once where texts .* faq, finance, medical$"):
        TextEncoder(tokenizers["wordpiece"], prompt, 100)


def test_every_template_has_a_form_for_texts_alone(tokenizers):
    assert TEMPLATES.keys() == ALONE_TEMPLATES.keys()
    prefixes = {name: TextEncoder(tokenizers["bytelevel"], name, 1000).prefix for name in (*TEMPLATES, None)}
    assert prefixes[None] == prefixes["faq"] and len({tuple(prefix) for prefix in prefixes.values()}) == 3


def test_the_mode_decides_which_encoder(tokenizers):
    words = tokenizers["wordpiece"]
    pair = student_encoder(words, "pair", SPACED, ANSWERS, 60)
    alone = student_encoder(words, "alone", ALONE, ANSWERS, 60)
    assert isinstance(pair, PairEncoder) and pair.answer_ids == bare(words, "是否")
    assert isinstance(alone, TextEncoder) and alone.suffix == bare(words, "=")
