"""Requests to a training: to stop, and for a checkpoint."""

from flipkd_dist.stop import StopRequest
from flipkd_dist.world import World


def test_the_two_requests_are_told_apart(tmp_path):
    stop, save = StopRequest(tmp_path / "stop"), tmp_path / "save"
    assert stop.made_with(save, World()) == (False, False)
    save.touch()
    assert stop.made_with(save, World()) == (False, True)
    stop.file.touch()
    assert stop.made_with(save, World()) == (True, True)
    save.unlink()
    assert stop.made_with(save, World()) == (True, False)
    assert stop.made(World())
