"""The buffer of losses: none lost, none out of order, none overwritten before it is read."""

import numpy as np
import pytest
import torch

from mien.core.training import loss_buffer
from mien.core.training.loss_buffer import LossBuffer


def test_rows_come_back_in_order(monkeypatch, device):
    monkeypatch.setattr(loss_buffer, "CAPACITY", 5)
    losses = LossBuffer(2, torch.device(device))
    pushed = 0
    for count in (3, 5, 1, 4):
        for _ in range(count):
            losses.push(torch.tensor([pushed, -pushed], dtype=torch.float32, device=device))
            pushed += 1
        rows = losses.fetch(count)()
        wanted = np.arange(pushed - count, pushed, dtype=np.float32)
        np.testing.assert_array_equal(rows, np.stack((wanted, -wanted), axis=1))


def test_rows_asked_for_survive_those_pushed_later(monkeypatch, device):
    monkeypatch.setattr(loss_buffer, "CAPACITY", 3)
    losses = LossBuffer(1, torch.device(device))
    for value in range(3):
        losses.push(torch.full((1,), float(value), device=device))
    asked = losses.fetch(3)
    for _ in range(3):
        losses.push(torch.full((1,), 9.0, device=device))
    assert asked()[:, 0].tolist() == [0, 1, 2]


def test_more_than_is_kept_is_refused():
    losses = LossBuffer(1, torch.device("cpu"))
    with pytest.raises(ValueError, match="the last 4096 rows are kept, asked for 4097"):
        losses.fetch(4097)
