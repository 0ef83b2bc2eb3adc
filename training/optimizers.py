"""Which optimizer updates which weights by which schedule, and what scales their gradients, as the settings say.

AdamW for all is the paper's; Muon for the matrices of the layers is ours. The order of an update lives in `loop.py`,
the parts in `hf_dalle.optimization` and `hf_dalle.gradient_scaling`.
"""

import torch
from arguments import TrainArguments

from hf_dalle.gradient_scaling import GlobalGradientScaler, GradientScaler, ResblockGradientScaler
from hf_dalle.optimization import BoundedAdamW, PlateauHalving, get_scheduler


def split_matrices(model: torch.nn.Module, is_muon: bool) -> list[dict]:
    """
    The trained parameters of `model` as groups for [`make_optimizers`]: one, or with `is_muon` the weights of the
    linear layers apart, which [Muon](https://kellerjordan.github.io/posts/muon/) is for. Embeddings, the head (tied to
    them or not), norms and biases stay AdamW's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not is_muon:
        return [{"params": trained}]
    not_hidden = _list_embeddings(model) | {id(model.get_output_embeddings().weight)}
    groups = {True: [], False: []}
    for parameter in trained:
        groups[parameter.ndim == 2 and id(parameter) not in not_hidden].append(parameter)
    return [{"params": params, "is_muon": is_matrix} for is_matrix, params in groups.items() if params]


def exempt_from_decay(model: torch.nn.Module, groups: list[dict]) -> list[dict]:
    """The groups with gains, biases and embeddings (a head tied to them too) apart, which no weight decay pulls at."""
    embeddings, split = _list_embeddings(model), []
    for group in groups:
        parts = {True: [], False: []}
        for parameter in group["params"]:
            parts[parameter.ndim >= 2 and id(parameter) not in embeddings].append(parameter)
        for is_decayed, params in parts.items():
            if params:
                split.append({**group, "params": params} | ({} if is_decayed else {"weight_decay": 0.0}))
    return split


def _list_embeddings(model: torch.nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}


def make_optimizers(args: TrainArguments, groups: list[dict]) -> list[torch.optim.Optimizer]:
    """
    AdamW over the groups without, Muon over those with a true `"is_muon"`; a group's own "lr" and "weight_decay" are
    kept.
    """
    chosen = {False: [], True: []}
    for group in groups:
        group = dict(group)
        chosen[group.pop("is_muon", False)].append(group)
    optimizers = []
    if chosen[False]:
        settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        settings |= {"weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
        if args.adam_max_second_moment is None:
            optimizers.append(torch.optim.AdamW(chosen[False], **settings))
        else:
            optimizers.append(BoundedAdamW(chosen[False], args.adam_max_second_moment, **settings))
    if chosen[True]:
        # Scaled so that an update has 0.2 times the learning rate as its root mean square, whatever the shape.
        scale = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": args.adam_weight_decay}
        optimizers.append(torch.optim.Muon(chosen[True], lr=args.muon_learning_rate, **scale))
    return optimizers


def make_schedules(
    args: TrainArguments, optimizers: list[torch.optim.Optimizer]
) -> tuple[list[torch.optim.lr_scheduler.LambdaLR], PlateauHalving | None]:
    """A schedule for each optimizer, and what they share where plateaus decide: it is to be shown the losses."""
    plateau = None
    if args.lr_scheduler == "reduce_lr_on_plateau":
        rule = (args.lr_plateau_steps, args.lr_plateau_threshold, args.lr_max_halvings)
        plateau = PlateauHalving(*rule, first_step=args.lr_warmup_steps)
    shape = (args.lr_warmup_steps, args.lr_decay_steps or args.max_train_steps, args.lr_min_ratio)
    return [get_scheduler(args.lr_scheduler, optimizer, *shape, plateau) for optimizer in optimizers], plateau


def make_gradient_scaler(args: TrainArguments, model: torch.nn.Module) -> GradientScaler:
    """
    What float16 needs: hooks on `model`, to be set before it is wrapped for several processes. A null scaler with
    another `mixed_precision`, which is Accelerate's.
    """
    if args.mixed_precision != "fp16":
        return GradientScaler(model)
    kinds = {"resblock": ResblockGradientScaler, "global": GlobalGradientScaler}
    return kinds[args.gradient_scaling](model)
