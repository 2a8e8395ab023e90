"""DP-SGD in two processes: one sum, noise once, rank 0 leads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sfumato.privacy.dp_sgd as module

sys.path.insert(0, str(Path(__file__).parent))
from fakes import FakePrivate, FakeReservation, Net, plain_rows, plan, row_loss

HERE = Path(__file__).parent


def weights(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


RANK = """
import sys; sys.path.insert(0, {here!r})
import json, os, numpy as np, torch, torch.distributed as dist, sfumato.privacy.dp_sgd as module
from fakes import *
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/meet", rank=rank, world_size=2)
draws = []
class Known(module.SecureStream):
    def gaussian(self, shape):
        draws.append(int(np.prod(shape)))
        return np.zeros(shape) if {zero} else super().gaussian(shape)
module.SecureStream = Known
net, held = Net(), FakeReservation() if rank == 0 else None
torch.nn.init.constant_(net.out.bias, float(rank))  # rank 0's weights count
chosen = plan(sampling_probability={q}, steps={steps}, clip_norm=1.0, expected_batch=1.0)
result = module.dp_sgd(net, FakePrivate(9), chosen, held, make_rows=plain_rows, row_loss=row_loss,
    optimizer=torch.optim.SGD(net.parameters(), lr=1.0))
flat = torch.cat([p.detach().flatten() for p in net.parameters()])
print(json.dumps([flat.tolist(), result.steps_begun, len(draws)]), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads can abort a process that takes itself down beside its peer
"""


def two_ranks(folder: Path, *, zero: bool, q: float, steps: int):
    code = RANK.format(here=str(HERE), folder=str(folder), zero=zero, q=q, steps=steps)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, env=env)
        for rank in (0, 1)
    ]
    answers = [child.communicate(timeout=400)[0] for child in started]
    assert all(child.returncode == 0 for child in started)
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def test_two_processes_sum_what_one_does(tmp_path, monkeypatch):
    class Known(module.SecureStream):
        def gaussian(self, shape):
            return np.zeros(shape)

    monkeypatch.setattr(module, "SecureStream", Known)
    net = Net()
    torch.nn.init.constant_(net.out.bias, 0.0)
    chosen = plan(sampling_probability=1.0, steps=1, clip_norm=1.0, expected_batch=1.0)
    module.dp_sgd(
        net, FakePrivate(9), chosen, FakeReservation(), make_rows=plain_rows, row_loss=row_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )  # fmt: skip
    first, second = two_ranks(tmp_path, zero=True, q=1.0, steps=1)
    assert first[0] == second[0] and first[1] == second[1] == 1
    assert torch.allclose(torch.tensor(first[0]), weights(net), atol=1e-5)
    assert second[2] == 0  # only rank 0 draws noise


def test_two_processes_add_noise_once(tmp_path):
    steps = 40
    first, second = two_ranks(tmp_path, zero=False, q=1e-12, steps=steps)
    net = Net()
    torch.nn.init.constant_(net.out.bias, 0.0)
    walked = torch.tensor(first[0]) - weights(net)
    assert first[0] == second[0] and second[2] == 0
    assert first[2] == len(list(net.parameters())) * steps  # one draw for each parameter and step
    assert walked.std().item() / steps**0.5 == pytest.approx(1.0, rel=0.5)
