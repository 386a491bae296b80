"""Pairs a second of ranking: candidates that share prompt and query against the same pairs padded, on the same cores.

    python benchmarks/rank_speed.py --candidates 100 --queries 5 --rounds 5
    python benchmarks/rank_speed.py --hidden 64 --layers 2 --rank 16 --queries 2 --rounds 2    # does it run?

A GLM of about 30 M parameters, built from a configuration, with LoRA of rank 384; fp32. Three kinds of texts: short
questions with short candidates (faq), with long documents, and long queries with short candidates. Sides:

    rank      `Matcher.rank` as it is: prefix and query computed once
    ungrouped the same student in batches of 64 pairs in the order of the list
    padded    our student, one pair a row, 64 pairs a batch, two-row logits: it lacks nothing but the sharing
    plain     transformers and PEFT alone: 64 padded pairs a batch, logits of the whole vocabulary

Each of them has the adapter in the base's weights, as `Matcher` does by default and as `merge_and_unload` does for a
user of PEFT; `rank:unmerged`, `padded:unmerged` and `plain:unmerged` have it beside them. Ratios compare equals:
`rank / padded` says what sharing earns, with and without merging, `rank / plain` what a user of transformers gains who
merges too. `rank / plain:unmerged` is the gain of one who does not. "100 candidates at least 3 times as fast as 100
padded pairs" is `rank / padded`, and its scores are those of `padded` within 1e-5.

Tokenising counts on every side. Runs alternate, all sides a round; a ratio is that of a round: lowest, median, highest.
"""

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import numpy as np

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
# About two tokens a word.
WORDS = {"faq": ((6, 15), (6, 20)), "documents": ((6, 15), (60, 160)), "long queries": ((60, 160), (6, 20))}
BATCH_PAIRS = 64
RATIOS = (
    ("rank", "padded"),
    ("rank:unmerged", "padded:unmerged"),
    ("rank", "plain"),
    ("rank:unmerged", "plain:unmerged"),
    ("rank", "plain:unmerged"),
)


def texts(count: int, words: tuple[int, int], generator: np.random.Generator) -> list[str]:
    """Sentences of `words` (fewest, most) made-up words."""
    vocabulary = ["".join(part) for part in np.random.default_rng(1).choice(SYLLABLES, (3000, 3))]
    return [" ".join(generator.choice(vocabulary, generator.integers(words[0], words[1] + 1))) for _ in range(count)]


def save_base(folder: Path, hidden: int, layers: int) -> Path:
    """A random GLM and a WordPiece tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

    from flipkd_dist.prompt import TEMPLATES

    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    corpus = [*texts(2000, (20, 40), np.random.default_rng(7)), *list(TEMPLATES.values()) * 50, *["Yes No"] * 50]
    inner.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=8000, special_tokens=["[PAD]", "[UNK]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=1024,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = GlmForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wider than the default, so that answers differ between texts
            torch.nn.init.normal_(parameter, std=hidden**-0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter_of(base: Path, folder: Path, rank: int) -> Path:
    """An adapter as after training: B is not zero."""
    import torch

    from flipkd_dist.adapter import AdapterCard, Probe, save_adapter
    from flipkd_dist.base import load_tokenizer
    from flipkd_dist.batches import BatchMaker
    from flipkd_dist.config import StudentConfig
    from flipkd_dist.evaluate import student_scores
    from flipkd_dist.model_files import fingerprint
    from flipkd_dist.prompt import PairEncoder
    from flipkd_dist.student import load_student
    from flipkd_dist.world import World

    tokenizer, settings = load_tokenizer(base), StudentConfig(model_name_or_path=str(base), lora_dropout=0.0)
    encoder = PairEncoder(tokenizer, "faq", ["Yes", "No"], 512)
    student = load_student(base, settings, encoder.answer_ids, rank)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in student.trained_parameters().items():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    probe = ("a", "b")
    [p_match], _ = student_scores(student, World(), BatchMaker(encoder, student, False), [probe], 1)
    card = AdapterCard(
        base_model=str(base),
        base_fingerprint=fingerprint(base),
        prompt="faq",
        answers=["Yes", "No"],
        encoder_module=student.encoder_module,
        max_length=512,
        threshold=0.5,
        step=1,
        probe=Probe(*probe, float(p_match), 0.0),
    )
    state = {name: value.detach() for name, value in student.trained_parameters().items()}
    save_adapter(folder, student, state, tokenizer, card)
    return folder


def plain_side(base: Path, adapter: Path, encoder, merge: bool):
    """p(match) of pairs as a user of transformers and PEFT has it: padded, with the logits of the whole vocabulary."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    if merge:
        model = model.merge_and_unload()

    @torch.inference_mode()
    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        found = []
        for at in range(0, len(pairs), BATCH_PAIRS):
            rows = [encoder.prefix + pair.ids for pair in encoder.encode_pairs(pairs[at : at + BATCH_PAIRS])]
            lengths = torch.tensor([len(row) for row in rows])
            ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            answers = logits[torch.arange(len(rows)), lengths - 1][:, encoder.answer_ids]
            found.append(torch.softmax(answers.double(), dim=1)[:, 0].numpy())
        return np.concatenate(found)

    return score


def sides(base: Path, adapter: Path, max_batch_tokens: int) -> dict:
    """Functions from the pairs of one query to their p(match)."""
    from flipkd_dist.batches import BatchMaker
    from flipkd_dist.evaluate import student_scores
    from flipkd_dist.predict import Matcher

    merged, unmerged = Matcher(adapter), Matcher(adapter, merge=False)
    encoder = merged.make_batch.encoder
    padded = BatchMaker(encoder, merged.student, share_prefix=False)

    def rank(matcher: Matcher, pairs: list[tuple[str, str]]) -> np.ndarray:
        best = matcher.rank(pairs[0][0], [text for _, text in pairs], max_batch_tokens=max_batch_tokens)
        scores = np.zeros(len(pairs))
        scores[[one.index for one in best]] = [one.p_match for one in best]
        return scores

    def in_order(matcher: Matcher, make_batch: BatchMaker, pairs: list[tuple[str, str]]) -> np.ndarray:
        return student_scores(matcher.student, matcher.world, make_batch, pairs, BATCH_PAIRS)[0]

    return {
        "rank": partial(rank, merged),
        "ungrouped": partial(in_order, merged, merged.make_batch),
        "padded": partial(in_order, merged, padded),
        "plain": plain_side(base, adapter, encoder, merge=True),
        "rank:unmerged": partial(rank, unmerged),
        "padded:unmerged": partial(in_order, unmerged, padded),
        "plain:unmerged": plain_side(base, adapter, encoder, merge=False),
    }


def measure(kind: str, given: dict, candidates: int, queries: int, rounds: int, clock) -> dict:
    """Pairs a second of each side, the `RATIOS` between sides, and the largest difference of scores."""
    generator = np.random.default_rng(3)
    query_words, candidate_words = WORDS[kind]
    pools = [
        [(query, text) for text in texts(candidates, candidate_words, generator)]
        for query in texts(queries, query_words, generator)
    ]
    scores = {name: np.concatenate([score(pairs) for pairs in pools]) for name, score in given.items()}  # warms up too
    speeds = []
    for number in range(rounds):
        order = list(given.items())
        order = order[number % len(order) :] + order[: number % len(order)]
        seconds = {}
        for name, score in order:
            start = clock()
            for pairs in pools:
                score(pairs)
            seconds[name] = clock() - start
        speeds.append({name: queries * candidates / seconds[name] for name in given})
        print(json.dumps({name: round(speed, 1) for name, speed in speeds[-1].items()}), file=sys.stderr, flush=True)
    result = {"texts": kind, "candidates": candidates, "queries": queries, "rounds": rounds}
    result["pairs_per_second"] = {name: round(statistics.median(s[name] for s in speeds), 1) for name in given}
    for one, other in RATIOS:
        if {one, other} <= given.keys():
            ratios = [speed[one] / speed[other] for speed in speeds]
            result[f"{one} / {other}"] = [
                round(value, 2) for value in (min(ratios), statistics.median(ratios), max(ratios))
            ]
    result["largest_difference_to_padded"] = {
        name: float(f"{np.abs(found - scores['padded']).max():.1e}") for name, found in scores.items()
    }
    result["spread_of_scores"] = round(float(scores["padded"].std()), 4)
    return result


@click.command(help=__doc__)
@click.option("--candidates", default=100, show_default=True, help="Of a query.")
@click.option("--queries", default=5, show_default=True, help="Ranked in a run, one after the other.")
@click.option("--rounds", default=5, show_default=True, help="Runs of each side.")
@click.option("--hidden", default=512, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--rank", default=384, show_default=True, help="r of LoRA.")
@click.option("--max-batch-tokens", default=8192, show_default=True)
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--cpu-time", is_flag=True, help="Seconds of the processor, not of the clock: for a busy machine.")
@click.option("--texts", "kinds", multiple=True, type=click.Choice(list(WORDS)), help="Default: all.")
@click.option("--side", "chosen", multiple=True, help="Only these, and padded and plain. Default: all.")
def main(candidates, queries, rounds, hidden, layers, rank, max_batch_tokens, threads, cpu_time, kinds, chosen) -> None:
    import torch

    torch.set_num_threads(threads)
    logging.getLogger("flipkd_dist").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        base = save_base(Path(scratch) / "base", hidden, layers)
        adapter = save_adapter_of(base, Path(scratch) / "adapter", rank)
        given = sides(base, adapter, max_batch_tokens)
        if chosen:
            given = {name: side for name, side in given.items() if name in {*chosen, "rank", "padded", "plain"}}
        parameters = sum(p.numel() for p in torch.nn.ModuleList([given["rank"].args[0].student]).parameters())
        print(
            json.dumps(
                {
                    "parameters": parameters,
                    "threads": threads,
                    "cpu_time": cpu_time,
                    "max_batch_tokens": max_batch_tokens,
                }
            )
        )
        for kind in kinds or WORDS:
            clock = time.process_time if cpu_time else time.perf_counter
            print(json.dumps(measure(kind, given, candidates, queries, rounds, clock)), flush=True)


if __name__ == "__main__":
    main()
