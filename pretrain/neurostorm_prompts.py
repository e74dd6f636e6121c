"""Task-specific prompt tuning: the backbone is frozen, prompts before every window learn.

After NeuroSTORM (Wang et al. 2025, arXiv 2506.11167), which calls it TPT.
"""

from boldforge.pretrain.model import NeuroStorm


def add_prompts(model: NeuroStorm, length: int) -> NeuroStorm:
    """Return a copy of a pretrained model in which every encoder block has prompts, and nothing else learns.

    Parameters
    ----------
    model
        Has no prompts yet.
    length
        P, prompts per block; the paper's 50 are 82,800 parameters at its size. They start small and random, drawn from
        torch's global generator.

    Raises
    ------
    ValueError
        If the model has prompts already, or `length` is not positive.
    """
    if length < 1 or model.config.prompts:
        raise ValueError(
            f"asked for {length} prompts on a model that has {model.config.prompts}; expected at least 1 on one without"
        )
    prompted = NeuroStorm(model.config.model_copy(update={"prompts": length}), model.token_grid)
    prompted.load_state_dict(model.state_dict(), strict=False)  # all but the prompts, which are new
    prompted.to(model.patch_embed.weight.device).train(model.training)
    for name, parameter in prompted.named_parameters():
        parameter.requires_grad_(name.endswith(".prompt"))
    return prompted
