"""Rank 0 alone works at the end of a training, and the others wait as long as that takes."""

import threading

import pytest

from flipkd_dist.train import on_main
from flipkd_dist.world import World


class Asked(World):
    """Of two ranks: `any` is answered by what the other one would say, and counted."""

    def __init__(self, rank: int):
        super().__init__(rank, 2)
        vars(self).update(asked=[], asked_thrice=threading.Event())  # the class is frozen

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        if self.is_main and len(self.asked) == 3:
            self.asked_thrice.set()  # only now can the work go on
        return flag or (not self.is_main and len(self.asked) == 3)


def test_collectives_go_on_while_rank_0_works():
    world, done = Asked(0), []
    on_main(world, lambda: done.append(world.asked_thrice.wait(2)), every_s=0.01)
    assert done == [True] and world.asked[:3] == [False] * 3 and world.asked[-1]


def test_the_others_do_not_work_and_leave_when_rank_0_is_done():
    world = Asked(1)
    on_main(world, lambda: pytest.fail("rank 1 works"), every_s=0.01)
    assert world.asked == [False] * 3


def test_an_error_of_rank_0_is_raised_there_after_the_others_were_told():
    world = Asked(0)

    def fail():
        raise RuntimeError("nothing was exported")

    with pytest.raises(RuntimeError, match="nothing was exported"):
        on_main(world, fail, every_s=0.01)
    assert world.asked[-1]


def test_one_process_asks_nobody():
    done = []
    on_main(World(), lambda: done.append(threading.current_thread()))
    assert done == [threading.main_thread()]
