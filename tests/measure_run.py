"""Trains some updates as `train.py` does and writes what its tensors take, for tests of dry runs.

`python measure_run.py OUTPUT.json CONFIG.yaml [options]`, or under torchrun: then the first process writes.
"""

import gc
import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "training"))


def main(output: str, argv: list[str]) -> None:
    import train

    measured = {}
    for module, name in ((train.train_dvae, "DVAEStage"), (train.train_prior, "PriorStage")):
        setattr(module, name, make_measured(getattr(module, name), measured))
    train.main(argv)
    if int(measured.pop("rank")) == 0:
        Path(output).write_text(json.dumps(measured))


def make_measured(kind: type, measured: dict) -> type:
    """The stage, which at the third update looks around: by then all states are there."""

    class Measured(kind):
        def compute_loss(self, model, batch, step):
            if step != 2 or not model.training or measured:  # of several parts of a batch the first
                return super().compute_loss(model, batch, step)
            own = {weight.untyped_storage()._cdata for weight in self.model.parameters()}
            saved = {}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    saved[storage._cdata] = storage
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, logs = super().compute_loss(model, batch, step)
            measured["activations"] = sum(storage.nbytes() for storage in saved.values())
            measure_states(self, model, measured)
            return loss, logs

    return Measured


def measure_states(stage: object, model: torch.nn.Module, measured: dict) -> None:
    """Bytes of weights, states and gradients, and of what DDP hands to all-reduces from here on."""
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers.training_utils import EMAModel

    measured["rank"] = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    measured["weights"] = count([*stage.model.parameters(), *stage.model.buffers()])
    things = [thing for thing in gc.get_objects() if issubclass(type(thing), (torch.optim.Optimizer, EMAModel))]
    optimizers = [thing for thing in things if not isinstance(thing, (AcceleratedOptimizer, EMAModel))]
    states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
    measured["optimizer"] = count([part for state in states for part in state if torch.is_tensor(part)])
    averages = [thing for thing in things if isinstance(thing, EMAModel)]
    measured["EMA"] = count([weight for average in averages for weight in average.shadow_params])
    measured["sent"], gradients = 0, {}

    def add_gradient(weight):
        gradients[id(weight)] = weight.grad.nbytes
        measured["gradients"] = sum(gradients.values())

    for weight in stage.model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(add_gradient)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):

        def reduce(state, bucket):
            buffer = bucket.buffer()
            measured["sent"] += buffer.nbytes
            work = torch.distributed.all_reduce(buffer.div_(torch.distributed.get_world_size()), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, reduce)


def count(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
