"""Models for the rules of passes/rules/vectorizer.py."""

from __future__ import annotations

import numpy as np

from . import Case, Sketch, strategy


@strategy("tfidf_as_comparisons")
def vectorizers(s: Sketch) -> Case:
    kind = s.pick("int32", "int64")
    sizes = [s.integer(1, 9)] if s.flag() else [s.integer(1, 3), s.integer(1, 9)]
    s.input("x", kind, s.random.integers(0, 3, sizes).astype(kind))
    most = s.integer(1, 3)
    pool, counts, total = [], [], 0
    for length in range(1, most + 1):
        counts.append(len(pool))
        rows = np.unique(s.random.integers(0, 3, [s.integer(1, 4), length]), axis=0)
        pool.extend(rows.ravel().tolist())
        total += len(rows)
    attrs = {
        "mode": s.pick("TF", "IDF", "TFIDF"),
        "min_gram_length": s.integer(1, most),
        "max_gram_length": most,
        "max_skip_count": s.integer(0, 2),
        "ngram_counts": counts,
        "ngram_indexes": s.random.permutation(total).tolist(),
        "pool_int64s": pool,
        "weights": s.random.uniform(0.1, 2, total).astype(np.float32).tolist(),
    }
    return s.model(lambda g, t: g.node("TfIdfVectorizer", [t["x"]], attrs), opset=s.pick(9, 13, 20))
