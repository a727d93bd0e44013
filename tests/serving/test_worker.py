"""The thread that owns the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from served import a_worker
from steer2edit.serving.worker import Question, answers_of, one_team


def test_only_the_worker_computes_with_several_threads(monkeypatch: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # whatever this machine has
    try:
        seen: list[int] = []
        with one_team() as threads:
            assert (threads, torch.get_num_threads()) == (3, 1)
            with a_worker(threads=threads) as (worker, _):
                whole_step = worker._batch.step
                monkeypatch.setattr(
                    worker._batch, "step", lambda: (seen.append(torch.get_num_threads()), whole_step())[1]
                )
                answers_of(worker, [Question((1, 2, 3), tokens=2)])
                assert set(seen) == {3}
                assert torch.get_num_threads() == 1
                with ThreadPoolExecutor(1) as later:  # as those of a web server
                    assert later.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
