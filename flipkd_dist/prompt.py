"""Prompt, texts and answers as tokens. Parts are tokenised apart, so a text's span is exact for every tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass

from flipkd_dist.errors import UserError

BLANK_START = "<|startofpiece|>"
MASK_FROM_END = 3  # where [MASK] stands in a pair that ends in a blank, counted from the end of the pair's tokens
TEMPLATES = {
    "faq": (
        "You know a company's frequently asked questions by heart. Would one and the same answer settle both of these "
        'questions? Reply with just "Yes" or "No".\nFirst: "{text_a}"\nSecond: "{text_b}"\nReply:'
    ),
    "finance": (
        "You are a specialist in finance. Do these two customer messages ask for the same thing? "
        'Reply with just "Yes" or "No".\nFirst: "{text_a}"\nSecond: "{text_b}"\nReply:'
    ),
    "medical": (
        "You are a specialist in medicine. Do these two texts deal with the same matter, so that a reader of the first "
        'is served by the second? Reply with just "Yes" or "No".\nFirst: "{text_a}"\nSecond: "{text_b}"\nReply:'
    ),
}
ALONE_TEMPLATES = {
    "faq": (
        "You know a company's frequently asked questions by heart. Which answer would settle this question? "
        'Think of its gist.\nQuestion: "{text}"\nGist:'
    ),
    "finance": (
        "You are a specialist in finance. What does this customer message ask for? "
        'Think of its gist.\nMessage: "{text}"\nGist:'
    ),
    "medical": (
        "You are a specialist in medicine. Which matter does this text deal with? "
        'Think of its gist.\nText: "{text}"\nGist:'
    ),
}


@dataclass(frozen=True)
class EncodedPair:
    """A pair's own tokens, behind the shared prefix: text 1, separator, text 2, suffix. Spans are within `ids`.

    The answer is read at the last token.
    """

    ids: list[int]
    text_a: slice
    text_b: slice
    truncated: bool = False


@dataclass(frozen=True)
class EncodedText:
    """A text's own tokens, behind the shared prefix: the text and the rest of the prompt. The span is within `ids`."""

    ids: list[int]
    text: slice
    truncated: bool = False


def _split(prompt: str | None) -> tuple[str, str, str]:
    template = TEMPLATES.get(prompt or "faq", prompt)
    for name in ("{text_a}", "{text_b}"):
        if template.count(name) != 1:
            raise UserError(
                f"student.prompt: {template[:60]!r} must hold {name} exactly once: "
                f"correct it or take one of {', '.join(TEMPLATES)}"
            )
    before, rest = template.split("{text_a}")
    if "{text_b}" not in rest:
        raise UserError("student.prompt: {text_b} stands before {text_a}: put {text_a} first")
    return before, *rest.split("{text_b}")


def _split_alone(prompt: str | None) -> tuple[str, str]:
    template = ALONE_TEMPLATES.get(prompt or "faq", prompt)
    if template.count("{text}") != 1:
        raise UserError(
            f"student.prompt: {template[:60]!r} must hold {{text}} exactly once where texts are encoded alone: "
            f"correct it or take one of {', '.join(ALONE_TEMPLATES)}"
        )
    before, after = template.split("{text}")
    return before, after


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _leading_specials(tokenizer) -> list[int]:
    """What the tokenizer puts before any input (BOS, [CLS], [gMASK]<sop>); what it appends is left out."""
    bare = _tokens(tokenizer, "a")
    full = tokenizer("a")["input_ids"]
    return next((full[:at] for at in range(len(full)) if full[at : at + len(bare)] == bare), [])


def _blank(tokenizer) -> list[int]:
    """[MASK] and the end of the context, then the token behind which the blank is filled: the original GLM's."""
    ids = [tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.get_vocab().get(BLANK_START)]
    if None in ids:
        raise UserError(
            f"student.model_name_or_path: its tokenizer lacks [MASK], <|endoftext|> or {BLANK_START}: "
            "take the one that belongs to this GLM"
        )
    return ids


class _Tokens:
    """A tokenizer that turns many texts into tokens at once and has the latest of them at hand."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def remember(self, texts: Iterable[str]) -> None:
        """Tokenise these texts in one go, much faster than one by one; `encode` has them at hand until the next call.

        What stood there before is forgotten, so that the caller bounds the memory.
        """
        wanted = [text for text in dict.fromkeys(texts) if text]
        ids = self.tokenizer(wanted, add_special_tokens=False)["input_ids"] if wanted else []
        self._known = dict(zip(wanted, ids, strict=True))

    def _ids(self, text: str) -> list[int]:
        found = self._known.get(text)
        return _tokens(self.tokenizer, text) if found is None else found

    def first_without_tokens(self, texts: Iterable[str]) -> str | None:
        """The first of these texts that `encode` would refuse; all of them are remembered."""
        texts = list(texts)
        self.remember(texts)
        return next((text for text in texts if not self._ids(text)), None)


class PairEncoder(_Tokens):
    """Turns two texts into tokens under one prompt; the same in training, evaluation, prediction and the registry."""

    def __init__(self, tokenizer, prompt: str | None, answers: list[str], max_length: int, blank: bool = False):
        """
        Args:
            max_length: counts the tokens of prompt and both texts.
            blank: whether the base answers in a blank behind the prompt (`base.fills_blank`).
        Raises:
            UserError: a prompt without {text_a} and {text_b} in this order, or too long for `max_length`.
        """
        before, between, after = _split(prompt)
        super().__init__(tokenizer)
        self.blank = blank
        self.prefix = _leading_specials(tokenizer) + _tokens(tokenizer, before)
        self.separator = _tokens(tokenizer, between)
        self.suffix = _tokens(tokenizer, after) + (_blank(tokenizer) if blank else [])
        self.room = max_length - len(self.prefix) - len(self.separator) - len(self.suffix)
        if self.room < 2:
            raise UserError(
                f"data.max_length: {max_length} tokens leave no room for two texts beside a prompt of "
                f"{max_length - self.room}: raise it or shorten student.prompt"
            )
        self.answer_ids = answer_ids(tokenizer, answers, after)

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> list[EncodedPair]:
        """`encode` of every pair, tokenised in one go and remembered."""
        self.remember(text for pair in pairs for text in pair)
        return [self.encode(*pair) for pair in pairs]

    def encode(self, text_a: str, text_b: str) -> EncodedPair:
        """Cut from the longer text first; at least one token of each stays, and all of the prompt."""
        a, b = self._ids(text_a), self._ids(text_b)
        if not a or not b:
            raise UserError(
                f"data: the student's tokenizer turns {(text_a if not a else text_b)[:40]!r} into no tokens: "
                "remove this pair"
            )
        kept_a, kept_b = kept_lengths(len(a), len(b), self.room)
        ids = a[:kept_a] + self.separator + b[:kept_b] + self.suffix
        start_b = kept_a + len(self.separator)
        truncated = kept_a < len(a) or kept_b < len(b)
        return EncodedPair(ids, slice(0, kept_a), slice(start_b, start_b + kept_b), truncated)


class TextEncoder(_Tokens):
    """Turns one text into tokens under its prompt, for a student that encodes texts alone."""

    answer_ids = (0, 1)  # nothing is answered; a student has two rows of its output matrix all the same

    def __init__(self, tokenizer, prompt: str | None, max_length: int):
        """
        Args:
            max_length: counts the tokens of prompt and text.
        Raises:
            UserError: a prompt without {text}, or too long for `max_length`.
        """
        super().__init__(tokenizer)
        before, after = _split_alone(prompt)
        self.prefix = _leading_specials(tokenizer) + _tokens(tokenizer, before)
        self.suffix = _tokens(tokenizer, after)
        self.room = max_length - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise UserError(
                f"data.max_length: {max_length} tokens leave no room for a text beside a prompt of "
                f"{max_length - self.room}: raise it or shorten student.prompt"
            )

    def encode(self, text: str) -> EncodedText:
        """Cut at the text's end; all of the prompt stays."""
        ids = self._ids(text)
        if not ids:
            raise UserError(
                f"data: the student's tokenizer turns {text[:40]!r} into no tokens: remove the pairs that have it"
            )
        kept = min(len(ids), self.room)
        return EncodedText(ids[:kept] + self.suffix, slice(0, kept), kept < len(ids))

    def encode_texts(self, texts: list[str]) -> list[EncodedText]:
        """`encode` of every text, tokenised in one go and remembered."""
        self.remember(texts)
        return [self.encode(text) for text in texts]


def student_encoder(
    tokenizer, mode: str, prompt: str | None, answers: list[str], max_length: int, blank: bool = False
) -> PairEncoder | TextEncoder:
    """What turns the texts of a student of this mode into tokens; arguments and errors are those of its class."""
    if mode == "alone":
        return TextEncoder(tokenizer, prompt, max_length)
    return PairEncoder(tokenizer, prompt, answers, max_length, blank)


def kept_lengths(length_a: int, length_b: int, room: int) -> tuple[int, int]:
    """How many tokens of each text fit into `room` (at least 2) when the longer text is cut first."""
    if length_a + length_b <= room:
        return length_a, length_b
    shorter = min(length_a, length_b, room // 2)
    return (shorter, room - shorter) if length_a <= length_b else (room - shorter, shorter)


def _without_lone_space(tokenizer, ids: list[int]) -> list[int]:
    return ids[1:] if len(ids) == 2 and tokenizer.convert_ids_to_tokens(ids[0]) == "▁" else ids


def answer_ids(tokenizer, answers: list[str], suffix: str) -> list[int]:
    """The single tokens that `answers` are, after a prompt that ends in `suffix`.

    Byte-level vocabularies write a word inside a sentence with its leading space, so after a prompt that does not end
    in white space that form is tried first; both answers take the same form. SentencePiece may write a text's leading
    space as a token of its own, which no answer inside a sentence has: it is left out.

    Raises:
        UserError: no form in which both answers are single, known and distinct tokens.
    """
    spaces = ["", " "] if suffix[-1:].isspace() else [" ", ""]
    for space in spaces:
        ids = [_without_lone_space(tokenizer, _tokens(tokenizer, space + answer)) for answer in answers]
        single = all(len(one) == 1 and one[0] != tokenizer.unk_token_id for one in ids)
        if single and ids[0] != ids[1]:
            return [ids[0][0], ids[1][0]]
    found = ", ".join(
        f"{answer!r} = {tokenizer.convert_ids_to_tokens(_tokens(tokenizer, answer))}" for answer in answers
    )
    raise UserError(
        f"student.answers: must be two different single tokens of the student's vocabulary, found {found}: "
        "choose others, such as 是 and 否"
    )
