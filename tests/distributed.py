"""What each of several processes does in the tests of ``process_group``; run as a script by test_distributed.

The processes of a group are forked, as each would take seconds to import torch.
"""

import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import hessinit


def net():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))


def data():
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(256, 20, generator=generator), torch.randint(0, 4, (256,), generator=generator)


def result(model):
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [v.detach().double().flatten().tolist() for v in values]


def calibrated(model, x, y, **options):
    model, report = hessinit.init_(model, (x, y), "cross_entropy", lr=0.1, return_report=True, **options)
    return {"weights": result(model), "samples": report.calibration.samples}


CASES = (
    *("plain", "replicated", "seedless", "closed form", "sharded", "sharded, budget"),
    *("bad labels", "no samples", "bad argument", "plain after errors"),
)


def main(rank, size, path):
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    said = {case: outcome(case, rank, size) for case in CASES}
    with open(f"{path}/{rank}.json", "w") as file:
        json.dump(said, file)
    dist.barrier()  # none leaves, and ends the connections of others, before all are done
    dist.destroy_process_group()


def outcome(case, rank, size):
    torch.manual_seed(rank)  # processes need not agree
    model, (x, y), group = net(), data(), dist.group.WORLD
    x, y = x[rank::size], y[rank::size]
    before = result(model)
    try:
        if case == "seedless":
            return calibrated(model, x, y, process_group=group)
        if case == "replicated":
            return calibrated(nn.parallel.DistributedDataParallel(model), x, y, seed=0)
        if case == "closed form":
            return {"weights": result(hessinit.init_(model, x, seed=0, process_group=group))}
        if case == "sharded":
            fully_shard(model)
            return {"weights": result(hessinit.init_(model, seed=0))}
        if case == "sharded, budget":
            fully_shard(model)
        y = y + 4 if case == "bad labels" and rank == 1 else y
        x = x[:0] if case == "no samples" and rank == 1 else x
        options = {"max_scale": 0.5} if case == "bad argument" and rank == 1 else {}
        return calibrated(model, x, y, process_group=group, seed=0, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "whole": result(model) == before}


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    for folder in sys.argv[1:]:
        number = int(Path(folder).name)
        running = [fork.Process(target=main, args=(rank, number, folder)) for rank in range(number)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        if any(process.exitcode for process in running):
            sys.exit(f"of {number} processes: {[process.exitcode for process in running]}")
