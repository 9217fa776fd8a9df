"""Seeing from outside who trains a model; all of it that needs no page."""

import os

from mien.core.run.holder import holder
from mien.core.run.lock import LOCK


def test_a_lock_that_is_a_pipe_is_no_holder_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    assert holder(tmp_path) is None
