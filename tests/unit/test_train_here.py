"""Ranks that a launcher has started: what rank 0 sees or cannot do is what all of them do."""

from dataclasses import dataclass

import pytest
from test_pipeline import config  # noqa: F401

from flipkd_dist import train_here
from flipkd_dist.errors import UserError
from flipkd_dist.together import Refusal
from flipkd_dist.world import World


class TwoRanks:
    """Rank 1 of 2; what rank 0 has to say is that it failed."""

    size, rank, is_main = 2, 1, False

    def any(self, _):
        return True

    def barrier(self):
        pass

    def gather_object(self, own):
        return [(None, Refusal("the server is down (rank 0 on a)", False, False)), own]


def test_where_rank_0_cannot_begin_the_others_do_not_train(config, monkeypatch):  # noqa: F811
    trained = []
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(train_here, "join_world", lambda *_: TwoRanks())
    monkeypatch.setattr(train_here, "train", lambda *_: trained.append(1))
    with pytest.raises(RuntimeError, match="the server is down"):
        train_here.train_here(config)
    assert not trained


@dataclass(frozen=True)
class Second(World):
    """Rank 1 of 2, whose file system is behind: what rank 0 has seen decides."""

    begun: tuple[str, ...] = ()
    refusal: Refusal | None = None
    rank: int = 1
    size: int = 2

    def gather_object(self, value):
        return [(None, self.refusal) if isinstance(value, tuple) else self.begun, value]

    def any(self, flag: bool) -> bool:
        return True  # rank 0 has looked


def test_what_rank_0_sees_is_what_all_ranks_do(config, monkeypatch):  # noqa: F811
    trained = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(train_here, "train", lambda *_: trained.append(1))
    config = config.model_copy(update={"distributed": config.distributed.model_copy(update={"num_workers": 2})})
    monkeypatch.setattr(train_here, "join_world", lambda *_: Second())
    train_here.train_here(config)
    assert not trained
    lacks = Refusal("the teacher's store lacks texts", False, False, is_user=True)
    monkeypatch.setattr(train_here, "join_world", lambda *_: Second(refusal=lacks))
    with pytest.raises(UserError, match="lacks texts"):
        train_here.train_here(config)
    assert not trained
    monkeypatch.setattr(train_here, "join_world", lambda *_: Second(begun=("run",)))
    train_here.train_here(config)
    assert trained
