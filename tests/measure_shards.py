"""Two or more processes shard a prior as Accelerate's FSDP2 does and update it: what each holds and sends.

`torchrun ... measure_shards.py OUTPUT.json CONFIG.json`; the first process writes.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dalle import DallePriorConfig, DallePriorForCausalLM


class SentBytes(TorchDispatchMode):
    """Counts what all-gathers give and reduce-scatters take, of the pieces that a ring moves."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name == "c10d::_allgather_base_":
            self.gathered += args[0].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.scattered += args[1].nbytes
        return func(*args, **(kwargs or {}))


def main(output: str, config: str) -> None:
    torch.distributed.init_process_group("gloo")
    prior = DallePriorForCausalLM(DallePriorConfig(**json.loads(Path(config).read_text()))).train()
    for layer in prior.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(prior)
    optimizer = torch.optim.AdamW(prior.parameters())
    ids = torch.zeros(2, prior.config.stream_length + 1, dtype=torch.long)
    ids[:, prior.config.text_length :] = prior.config.image_token_offset
    with SentBytes() as sent:
        prior(ids, labels=ids).loss.backward()
    gradients = sum(weight.grad.to_local().nbytes for weight in prior.parameters())
    optimizer.step()
    states = [part for state in optimizer.state.values() for part in state.values()]
    local = [part.to_local() if hasattr(part, "to_local") else part for part in states]
    measured = {
        "weights": sum(weight.to_local().nbytes for weight in prior.parameters()),
        "gradients": gradients,
        "optimizer": sum(part.nbytes for part in local),
        "gathered": sent.gathered,
        "scattered": sent.scattered,
    }
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
