"""NeuroSTORM written down a second time, plainly: pad, roll, partition, Mamba token by token, reverse, roll back.

From the equations and the table of Wang et al. 2025 (arXiv 2506.11167) and the key names of its checkpoints, sharing no
line with the package. Slow and obvious; it is what the package is compared with.

Arrays are [B, x, y, z, t, C]. Windows are [windows of all clips, places, C], places in raster order, t fastest.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The published network; tests shrink it."""

    image: tuple[int, int, int, int] = (96, 96, 96, 20)
    patch: int = 6
    dim: int = 36
    depths: tuple[int, ...] = (2, 2, 6, 2)
    window: tuple[int, int, int, int] = (4, 4, 4, 4)
    first_window: tuple[int, int, int, int] = (4, 4, 4, 4)
    whole_last: bool = True
    prompts: int = 0
    tokens: str = "new"  # "new": three mask tokens; "old": one per place in the window, called mask_token


def cut_windows(x: Tensor, window: tuple[int, ...]) -> Tensor:
    pieces = []
    for clip in x:
        starts = [range(0, size, wide) for size, wide in zip(clip.shape, window, strict=False)]
        for i, j, k, m in product(*starts):
            a, b, c, d = window
            pieces.append(clip[i : i + a, j : j + b, k : k + c, m : m + d].reshape(-1, clip.shape[-1]))
    return torch.stack(pieces)


def paste_windows(pieces: Tensor, window: tuple[int, ...], shape: torch.Size) -> Tensor:
    clips, number = [], 0
    for _ in range(shape[0]):
        clip = pieces.new_zeros(shape[1:])
        for i, j, k, m in product(*[range(0, size, wide) for size, wide in zip(shape[1:], window, strict=False)]):
            a, b, c, d = window
            clip[i : i + a, j : j + b, k : k + c, m : m + d] = pieces[number].view(*window, -1)
            number += 1
        clips.append(clip)
    return torch.stack(clips)


class PlainMamba(nn.Module):
    def __init__(self, dim: int, states: int = 16) -> None:
        super().__init__()
        inner, self.rank, self.states = 2 * dim, math.ceil(dim / 16), states
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.rand(inner, states) * states + 1))
        self.D = nn.Parameter(torch.rand(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = functional.silu(self.conv1d(u.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, B, C = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        delta = functional.softplus(self.dt_proj(dt))
        A = -self.A_log.exp()
        state = u.new_zeros(len(x), u.shape[2], self.states)
        outputs = []
        for now in range(length):
            d = delta[:, now, :, None]
            state = torch.exp(d * A) * state + d * B[:, now, None, :] * u[:, now, :, None]
            outputs.append((state * C[:, now, None, :]).sum(-1) + self.D * u[:, now])
        return self.out_proj(torch.stack(outputs, dim=1) * functional.silu(gate))


class PlainMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(functional.gelu(self.linear1(x)))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, window: tuple[int, ...], shifted: bool, prompts: int = 0) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mamba, self.mlp = PlainMamba(dim), PlainMlp(dim)
        if prompts:
            self.prompt = nn.Parameter(torch.randn(1, prompts, dim))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:5]
        window = tuple(min(g, w) for g, w in zip(grid, self.window, strict=True))
        move = [w // 2 if self.shifted and g > w else 0 for g, w in zip(grid, self.window, strict=True)]
        axes = (1, 2, 3, 4)
        rolled = torch.roll(self.norm1(x), [-m for m in move], axes)
        pieces = cut_windows(rolled, window)
        if hasattr(self, "prompt"):
            before = self.prompt.expand(len(pieces), -1, -1)
            pieces = self.mamba(torch.cat([before, pieces], dim=1))[:, before.shape[1] :]
        else:
            pieces = self.mamba(pieces)
        x = x + torch.roll(paste_windows(pieces, window, x.shape), move, axes)
        return x + self.mlp(self.norm2(x))


class PlainMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(8 * dim), nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        children = [x[:, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        return self.reduction(self.norm(torch.cat(children, dim=-1)))


class PlainExpanding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Linear(dim, 4 * dim, bias=False), nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        B, X, Y, Z, T, C = x.shape
        made = self.expand(x).view(B, X, Y, Z, T, 8, C // 2)
        fine = made.new_zeros(B, 2 * X, 2 * Y, 2 * Z, T, C // 2)
        for place, (i, j, k) in enumerate(product((0, 1), repeat=3)):
            fine[:, i::2, j::2, k::2] = made[..., place, :]
        return self.norm(fine)


class PlainStage(nn.Module):
    def __init__(self, blocks: list[nn.Module], **after: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, module in after.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class PlainEmbedding(nn.Module):
    def __init__(self, dim: int, grid: tuple[int, ...], frames: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, dim, *grid, 1) * 0.1)
        self.time_embed = nn.Parameter(torch.randn(1, dim, 1, 1, 1, frames) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.pos_embed + self.time_embed).movedim(1, -1)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch, self.fc = patch, nn.Linear(patch**3, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(patches(images, self.patch))


def patches(images: Tensor, p: int) -> Tensor:
    """[B, X, Y, Z, T] to [B, x, y, z, T, p³]."""
    cut = images.unfold(1, p, p).unfold(2, p, p).unfold(3, p, p)
    return cut.reshape(*cut.shape[:5], p**3)


class Transcription(nn.Module):
    """The encoder; with ``decoder`` the masked autoencoder."""

    # benchmarks/pretrain_parts puts faster ones of the same parameters here.
    block, expanding = PlainBlock, PlainExpanding

    def __init__(self, shape: Shape, decoder: bool = True) -> None:
        super().__init__()
        self.shape = shape
        *image, frames = shape.image
        dims = [shape.dim * 2**i for i in range(len(shape.depths))]
        grids = [tuple(size // shape.patch // 2**i for size in image) for i in range(len(dims))]
        self.patch_embed = PatchEmbed(shape.patch, shape.dim)
        self.pos_embeds = nn.ModuleList(PlainEmbedding(d, g, frames) for d, g in zip(dims, grids, strict=True))
        layers = []
        for i, (dim, depth) in enumerate(zip(dims, shape.depths, strict=True)):
            last = i == len(dims) - 1
            window = shape.first_window if i == 0 else shape.window
            window = (*grids[i], shape.window[3]) if last and shape.whole_last else window
            shifts = [number % 2 == 1 and not (last and shape.whole_last) for number in range(depth)]
            blocks = [self.block(dim, window, shifted, shape.prompts) for shifted in shifts]
            layers.append(PlainStage(blocks, **({} if last else {"downsample": PlainMerging(dim)})))
        self.layers = nn.ModuleList(layers)
        if decoder:
            self._add_decoder(dims)

    def _add_decoder(self, dims: list[int]) -> None:
        shape = self.shape
        self.first_patch_expanding = self.expanding(dims[-1])
        layers = []
        for i in reversed(range(len(dims) - 1)):
            blocks = [self.block(dims[i], shape.window, n % 2 == 1) for n in range(shape.depths[i])]
            layers.append(PlainStage(blocks, **({"upsample": self.expanding(dims[i])} if i else {})))
        self.layers_up = nn.ModuleList(layers)
        self.norm_up = nn.LayerNorm(dims[0])
        self.decoder_pred = nn.Linear(dims[0], shape.patch**3)
        per_place = nn.Parameter(torch.randn(math.prod(shape.window), dims[0]))
        if shape.tokens == "old":
            self.mask_token = per_place
        else:
            self.mask_token, self.window_mask_token = nn.Parameter(torch.randn(dims[0])), per_place
            self.atlas_mask_token = nn.Parameter(torch.randn(dims[0]))

    def hide(self, x: Tensor, mask: Tensor, kind: str) -> Tensor:
        """Replace the tokens where the mask [B, x, y, z, t] is true; kind: random, window or atlas."""
        if kind == "window":
            per_place = self.mask_token if self.shape.tokens == "old" else self.window_mask_token
            repeats = [size // wide for size, wide in zip(x.shape[1:5], self.shape.window, strict=True)]
            token = per_place.view(*self.shape.window, -1).repeat(*repeats, 1)
        else:
            token = self.mask_token if kind == "random" else self.atlas_mask_token
        return torch.where(mask.unsqueeze(-1), token, x)

    def encode(self, images: Tensor, mask: Tensor | None = None, kind: str = "window") -> Tensor:
        x = self.patch_embed(images)
        if mask is not None:
            x = self.hide(x, mask, kind)
        for embed, layer in zip(self.pos_embeds, self.layers, strict=True):
            x = layer(embed(x))
        return x

    def forward(self, images: Tensor, mask: Tensor | None = None, kind: str = "window") -> Tensor:
        """Images [B, X, Y, Z, T] to patches [B, x, y, z, t, p³]."""
        x = self.first_patch_expanding(self.encode(images, mask, kind))
        for layer in self.layers_up:
            x = layer(x)
        return self.decoder_pred(self.norm_up(x))

    def loss(self, images: Tensor, mask: Tensor, kind: str = "window") -> Tensor:
        """Mean squared error over the voxels of hidden tokens, background included."""
        error = (self(images, mask, kind) - patches(images, self.shape.patch)).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


def hyper_parameters(shape: Shape, model: str = "neurostorm", **more: object) -> dict[str, object]:
    """What Lightning keeps beside the weights."""
    return {
        "model": model,
        "img_size": list(shape.image),
        "patch_size": [shape.patch] * 3 + [1],
        "depths": list(shape.depths),
        "embed_dim": shape.dim,
        "window_size": list(shape.window),
        "first_window_size": list(shape.first_window),
        "last_layer_full_MSA": shape.whole_last,
        "c_multiplier": 2,
        "in_chans": 1,
        "spatial_mask": "window",
        "time_mask": "random",
        "mask_ratio": 0.5,
        "sequence_length": shape.image[3],
        "learning_rate": 5e-5,
        **({"prompt_len": shape.prompts} if shape.prompts else {}),
        **more,
    }


def lightning(network: nn.Module, settings: dict[str, object], **keys: Tensor) -> dict[str, object]:
    """A checkpoint as Lightning writes it."""
    weights = {f"model.{name}": tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return {
        "epoch": 29,
        "global_step": 1000,
        "pytorch-lightning_version": "1.9.4",
        "state_dict": {**weights, **keys},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 5e-5}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": settings,
    }
