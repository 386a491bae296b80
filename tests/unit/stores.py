"""Small stores for the tests: texts with vectors that only they have, and damage of every kind."""

import os

import numpy as np

from flipkd_dist.store import Store, StoreSpec

SPEC = StoreSpec(teacher_fingerprint="f" * 32, pooling="mean", max_length=128, hidden_size=6)
TEXTS = [f"text {number}" for number in range(12)]


def vector_of(text, sign=1.0):
    """A unit vector [6] that only this text has."""
    vector = np.random.default_rng(list(text.encode())).normal(size=6)
    return (sign * vector / np.linalg.norm(vector)).astype(np.float32)


def expected(texts, sign=1.0):
    """What a float16 store gives back: rounded, then of length 1; float32 [n, 6]."""
    stored = np.stack([vector_of(text, sign).astype(np.float16) for text in texts]).astype(np.float32)
    return stored * (1 / np.sqrt(np.einsum("ij,ij->i", stored, stored)))[:, None]


def write(store, texts, sign=1.0):
    return store.write_shard(texts, np.stack([vector_of(text, sign) for text in texts]))


def full_store(folder, spec=SPEC, sign=1.0):
    """All texts in three shards, published."""
    store = Store(folder, spec)
    for start in (0, 4, 8):
        write(store, TEXTS[start : start + 4], sign)
    store.publish()
    return store


def missing(store, texts):
    """The unique texts that no complete shard holds, in the order given."""
    unique = list(dict.fromkeys(texts))
    return [text for text, is_there in zip(unique, store.holds(unique), strict=True) if not is_there]


def shards(store):
    return sorted(store.folder.glob(f"{store.spec.key}-*.parquet"))


def is_tidy(store):
    """Whether nothing is in the folder but shards, a lock, a manifest and one index for each specification."""
    names = [path.name for path in store.folder.iterdir() if path.suffix != ".parquet" and path.name != ".lock"]
    kinds = sorted(name.split(".", 1)[1] for name in names)
    return kinds == ["json", "keys", "rows"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path, where, bit=0):
    content = bytearray(path.read_bytes())
    content[where] ^= 1 << bit
    path.write_bytes(content)


def flip_vector(path, text):
    """One bit of a text's vector in a shard or in the array of rows."""
    where = path.read_bytes().find(vector_of(text).astype(np.float16).tobytes())
    assert where > 0
    flip(path, where)


def delete(path):
    path.unlink()


def killed_at(step, function):
    """Run `function` in a fork that ends at once at its `step`-th durable step; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(original):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return original(*arguments, **options)

            return call

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9
