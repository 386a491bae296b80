"""How good rankings are, by trec_eval's own code (pytrec_eval).

It sorts by score as float32, then by document id, the greater one first; a rank in a file means nothing to it.
"""

from collections.abc import Iterator

CUT = 10  # of nDCG and MRR
RECALLS = (1, 10, 100)
Judgements = dict[str, dict[str, int]]  # query -> document -> grade, relevant above 0
Run = dict[str, dict[str, float]]  # query -> document -> score


def names(top_k: int) -> list[str]:
    """The metrics of lists of `top_k` documents: recall beyond their end would only seem to be measured."""
    return [f"ndcg@{CUT}", f"mrr@{CUT}", "map", *(f"recall@{k}" for k in RECALLS if k <= top_k)]


def query_metrics(judged: Judgements, run: Run, top_k: int) -> Iterator[dict[str, float]]:
    """The metrics of each query of `judged`, in its order; a query of which nothing was found has zeros.

    MAP is that of the lists as they are: what stands beyond `top_k` counts as not found. The gain of a document in nDCG
    is its grade.
    """
    import pytrec_eval

    recalls = ",".join(str(k) for k in RECALLS)
    measures = {f"ndcg_cut.{CUT}", "recip_rank", "map", f"recall.{recalls}"}
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate({query: run.get(query, {}) for query in judged})
    for query in judged:
        own = found[query]
        reciprocal = own["recip_rank"]
        values = {
            f"ndcg@{CUT}": own[f"ndcg_cut_{CUT}"],
            f"mrr@{CUT}": reciprocal if reciprocal * (CUT + 0.5) > 1 else 0.0,  # there is no cut of its own
            "map": own["map"],
        }
        values |= {f"recall@{k}": own[f"recall_{k}"] for k in RECALLS}
        yield {name: values[name] for name in names(top_k)}
