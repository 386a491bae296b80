"""The verbs that encode or compare texts: `predict`, `rank`, `embed`, `retrieve`, `cluster`.

Heavy imports happen inside them.
"""

import json
import logging
from pathlib import Path

import click

from flipkd_dist.errors import UserError
from flipkd_dist.verb_options import batched, encoding, grouped

logger = logging.getLogger("flipkd_dist")


@click.command()
@click.argument("model")
@click.option(
    "--input", "input_", type=click.Path(path_type=Path), required=True, help="Pairs: JSONL, CSV, TSV or Parquet."
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="The same records with p_match and match."
)
@click.option("--text-a", default="text_a", show_default=True, help="Column of the first text.")
@click.option("--text-b", default="text_b", show_default=True, help="Column of the second text.")
@batched
def predict(model, input_, output, text_a, text_b, max_batch_tokens, batch_size, base_model, tracking_uri) -> None:
    """p(match) of each pair. MODEL is a run folder, an adapter folder or models:/NAME@ALIAS."""
    from flipkd_dist.predict_file import predict_file
    from flipkd_dist.token_batches import BatchLimits

    limits = BatchLimits(max_batch_tokens, batch_size)
    count = predict_file(model, input_, output, text_a, text_b, limits, base_model, tracking_uri)
    logger.info("%d pairs -> %s", count, output)


@click.command()
@click.argument("model")
@click.option(
    "--input",
    "input_",
    type=click.Path(path_type=Path),
    required=True,
    help="Queries with lists of candidates: JSONL or Parquet. With --queries and --corpus: a TREC run.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The same records with ranking: .jsonl or .parquet; or a TREC run: .trec.",
)
@click.option("--top-k", type=click.IntRange(1), help="Only the best of each list. Default: all.")
@click.option("--queries", type=click.Path(path_type=Path), help="Texts of a run's queries: JSONL with _id and text.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Of its documents: JSONL with _id, title and text.")
@click.option("--text-a", help="Column of the query, which is the first text.  [default: text_a]")
@click.option("--candidates", help='Column of the list, of texts or {"id", "text"}.  [default: candidates]')
@batched
def rank(
    model,
    input_,
    output,
    top_k,
    queries,
    corpus,
    text_a,
    candidates,
    max_batch_tokens,
    batch_size,
    base_model,
    tracking_uri,
) -> None:
    """Candidates of each query, sorted by p(match): many for one query cost much less than as many pairs.

    MODEL is a run folder, an adapter folder or models:/NAME@ALIAS. A ranking holds index (from 0, in the list), id,
    p_match and similarity. Inputs may be larger than memory.
    """
    from flipkd_dist.rank_file import rank_file
    from flipkd_dist.token_batches import BatchLimits

    limits = BatchLimits(max_batch_tokens, batch_size)
    counts = rank_file(
        model, input_, output, queries, corpus, text_a, candidates, top_k, limits, base_model, tracking_uri
    )
    logger.info("%d queries, %d pairs -> %s", *counts, output)


@click.command()
@click.option(
    "--input", "input_", type=click.Path(path_type=Path), required=True, help="Texts: JSONL, CSV, TSV or Parquet."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help=".parquet with id and vector, or .npy with the vectors alone.",
)
@click.option("--text", default="text", show_default=True, help="Column of the text.")
@click.option("--id", "name", help="Column of names, then required. Default: id, where records have it.")
@encoding
def embed(input_, output, text, name, **options) -> None:
    """Unit vector of each text. MODEL: a run or adapter folder or models:/NAME@ALIAS of student.mode alone."""
    choice = _choice(**options)
    _check_server(choice.tracking_uri, choice.model)
    from flipkd_dist.embed_file import embed_file

    logger.info("%d vectors of %d numbers -> %s", *embed_file(choice, input_, output, text, name), output)


@click.command()
@click.option("--data", required=True, metavar="FOLDER[:SPLIT]", help="A BEIR folder: corpus, queries, qrels.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write; new or empty.")
@click.option("--top-k", default=100, show_default=True, type=click.IntRange(10), help="Documents of a query.")
@click.option("--ann", type=click.Choice(["hnsw", "ivf"]), help="An approximate search by FAISS. Default: exact.")
@click.option("--rerank", help="Ranks the first of each list again: an adapter as MODEL, but of student.mode pair.")
@click.option("--rerank-top-k", type=click.IntRange(1), help="So many of each list.  [default: 20]")
@click.option("--rerank-base-model", help="Where the base of --rerank is, if not where it was in training.")
@click.option(
    "--vectors",
    type=click.Path(path_type=Path),
    help="A folder where the documents' vectors stay: the next search, or this one once killed, goes on with them.",
)
@click.option("--query-prompt", help="Before queries, in place of --prompt.")
@click.option("--document-prompt", help="Before documents, in place of --prompt.")
@encoding
def retrieve(data, output, top_k, ann, rerank, rerank_top_k, rerank_base_model, vectors, **options) -> None:
    """Find the documents of a BEIR folder for its queries, and measure it. MODEL as in `embed`.

    Writes run.trec, with --rerank reranked.trec, and metrics.json: nDCG@10, MRR@10, MAP, recall at 1, 10 and 100.
    """
    given = dict(options)
    if rerank and options["encoder"]:
        options |= {"tracking_uri": None, "max_batch_tokens": None}  # they are meant for --rerank
    choice = _choice(**options)
    _check_server(given["tracking_uri"], choice.model, rerank)
    if rerank is None and (rerank_top_k or rerank_base_model):
        raise UserError("--rerank-top-k and --rerank-base-model: have no effect without --rerank: leave them out")
    from flipkd_dist import retrieve_folder
    from flipkd_dist.token_batches import BatchLimits

    again = None
    if rerank:
        limits = BatchLimits(given["max_batch_tokens"] or BatchLimits.tokens, given["batch_size"] or BatchLimits.pairs)
        again = retrieve_folder.Rerank(rerank, rerank_top_k or 20, rerank_base_model, given["tracking_uri"], limits)
    click.echo(retrieve_folder.table(retrieve_folder.retrieve(choice, data, output, top_k, ann, again, vectors)))
    logger.info("-> %s", output)


@click.command()
@grouped
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Runs of k-means: 0, 1, ...")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@encoding
def cluster(input_, text, group, seeds, as_json, **options) -> None:
    """Does k-means over the vectors find the groups of the texts? MODEL as in `embed`."""
    choice = _choice(**options)
    _check_server(choice.tracking_uri, choice.model)
    from flipkd_dist import cluster_file

    found = cluster_file.cluster_file(choice, input_, text, group, seeds)
    click.echo(json.dumps(found, indent=2) if as_json else cluster_file.table(found))


def _choice(**options):
    """What the options of `encoding` say."""
    from flipkd_dist.text_encoder import EncoderChoice

    choice = EncoderChoice(**options)
    choice.check()
    return choice


def _check_server(tracking_uri, *models) -> None:
    if tracking_uri and not any(model and model.startswith("models:/") for model in models):
        raise UserError("--tracking-uri: has no effect without a models:/ name: leave it out")
