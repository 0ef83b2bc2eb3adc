"""Which optimizer updates which weights: AdamW for all (the paper), or Muon for the matrices of the layers.

The order of an update lives in `loop.py`; the learning rate's schedule in `hf_dalle.optimization`.
"""

import torch
from arguments import TrainArguments


def split_matrices(model: torch.nn.Module, is_muon: bool) -> list[dict]:
    """
    The trained parameters of `model` as groups for [`make_optimizers`]: one, or with `is_muon` the weights of the
    linear layers apart, which [Muon](https://kellerjordan.github.io/posts/muon/) is for. Embeddings, the head (tied to
    them or not), norms and biases stay AdamW's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not is_muon:
        return [{"params": trained}]
    not_hidden = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    not_hidden.add(id(model.get_output_embeddings().weight))
    groups = {True: [], False: []}
    for parameter in trained:
        groups[parameter.ndim == 2 and id(parameter) not in not_hidden].append(parameter)
    return [{"params": params, "is_muon": is_matrix} for is_matrix, params in groups.items() if params]


def make_optimizers(args: TrainArguments, groups: list[dict]) -> list[torch.optim.Optimizer]:
    """AdamW over the groups without, Muon over those with a true `"is_muon"`; a group's own "lr" is kept."""
    chosen = {False: [], True: []}
    for group in groups:
        group = dict(group)
        chosen[group.pop("is_muon", False)].append(group)
    optimizers = []
    if chosen[False]:
        betas = (args.adam_beta1, args.adam_beta2)
        shared = {"weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
        optimizers.append(torch.optim.AdamW(chosen[False], lr=args.learning_rate, betas=betas, **shared))
    if chosen[True]:
        # Scaled so that an update has 0.2 times the learning rate as its root mean square, whatever the shape.
        scale = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": args.adam_weight_decay}
        optimizers.append(torch.optim.Muon(chosen[True], lr=args.muon_learning_rate, **scale))
    return optimizers
