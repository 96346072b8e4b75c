"""Try another attention on a model of timm: its weights stay, its attention is exchanged in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from visattn.layers import TokenMixer, create_token_mixer


class Parameters(NamedTuple):
    """A parameter's name in the model, and its number of elements."""

    name: str
    number: int


@dataclass(frozen=True)
class SwapReport:
    """What `swap_attention` did; `print` it, or give new parameters a learning rate of their own by their names.

    Attributes:
        model: Class of the model.
        attention: Name of the attention that it has now.
        blocks: Names of the blocks that have it.
        kept: Parameters that the old attention had and the new one uses: the same tensors, with their values.
        new: Parameters that the new attention adds, freshly initialised.
        dropped: Parameters of the old attention without a counterpart; they are no longer in the model.
        untouched: Number of parameters outside the exchanged attention.
        notes: What else is different now, a sentence each.
    """

    model: str
    attention: str
    blocks: list[str]
    kept: list[Parameters]
    new: list[Parameters]
    dropped: list[Parameters]
    untouched: int
    notes: list[str]

    def __str__(self) -> str:
        where = self.blocks[0] if len(self.blocks) == 1 else f"{self.blocks[0]} to {self.blocks[-1]}"
        lines = [f"{self.model}: {self.attention!r} attention in {where} (blocks: {len(self.blocks)})"]
        for word, entries in (("kept", self.kept), ("new", self.new), ("dropped", self.dropped)):
            what = dict.fromkeys(entry.name.partition(".attn.")[2] for entry in entries)
            lines.append(f"  {word:<9} {sum(e.number for e in entries):>13,}  {', '.join(what) or '-'}")
        lines.append(f"  untouched {self.untouched:>13,}")
        return "\n".join([*lines, *(f"  Note: {note}" for note in self.notes)])


class MixerBlock(Block):
    """timm's ViT block around a token mixer. `swap_attention` makes it of a `Block`, which keeps its other modules.

    The grid of tokens is the model's, also after its `set_input_size`.
    """

    attn: Any  # a token mixer
    grid_size: list[int]
    patch_embed_of_model: list[Any]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, P + H * W, C] -> the same.

        Raises:
            ValueError: Tokens that are not those of the model's grid, a mask, or causal attention.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("expected no attn_mask and is_causal=False: swapped attention attends to all tokens")
        size = list(self.patch_embed_of_model[0].grid_size)
        _check_tokens(x, self.attn.num_prefix_tokens, size)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), size)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MapBlock(SwinTransformerBlock):
    """timm's Swin block with a token mixer over the whole map, of any size, instead of windows."""

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Note the size of the map, which is the window; the attention takes any."""
        # pyrefly: ignore[bad-override-mutable-attribute]: what timm has there is a pair too
        self.input_resolution = self.window_size = tuple(feat_size)
        self.window_area = feat_size[0] * feat_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@torch.fx.wrap
def _check_tokens(x: Tensor, num_prefix_tokens: int, size: list[int]) -> None:
    if x.shape[1] != num_prefix_tokens + size[0] * size[1]:
        raise ValueError(
            f"expected {num_prefix_tokens} prefix tokens and a grid of {size[0]} x {size[1]} tokens, got {x.shape[1]} "
            "tokens; try images of the size that the model was built for, or its set_input_size"
        )


class _Site(NamedTuple):
    """A block to change, and the map that its attention is made for."""

    name: str
    block: Any  # one of timm, or of those above
    feat_size: tuple[int, int]
    num_prefix_tokens: int


def swap_attention(
    model: nn.Module, attention: str, depth: int | Sequence[int] | None = None, **attention_args: Any
) -> SwapReport:
    """Exchange the attention of a timm ViT, DeiT or Swin for a token mixer of this package, in place.

    Projections (`qkv`, `proj`) stay the very modules they were, with weights, names, device, dtype, mode and whatever
    an optimizer knows of them. New parameters come with the initialisation of their layer, on the device and in the
    dtype of `qkv`. To load a swapped model's state dict, build the model, swap, then load; a state dict of the model
    as it was loads with `strict=False`.

    In a ViT the attention knows the grid of patches and the prefix tokens (class, distillation and register tokens). In
    a Swin it attends over the whole map: the blocks have neither windows nor shift any more.

    Args:
        model: `VisionTransformer` (DeiT with distillation too) or `SwinTransformer` of timm, or one swapped before.
        attention: A name of `visattn.layers.TOKEN_MIXERS`, such as "softmax", "agent" or "relu_linear".
        depth: Only the first `depth` blocks of a ViT; for a Swin, how many of each stage, as in (2, 2, 0, 0). Default:
            all blocks.
        attention_args: Arguments of the layer, such as `num_agents=9`.

    Returns:
        What was kept, what is new, what was dropped.

    Raises:
        TypeError: A model or attention of another kind, or arguments that the layer does not have.
        ValueError: Another name, a depth that does not fit, or options of the model that the attention cannot have.
            Whatever is raised, the model is as before.
    """
    if isinstance(model, VisionTransformer):
        sites, notes = _vit_sites(model, depth)
    elif isinstance(model, SwinTransformer):
        sites, notes = _swin_sites(model, depth)
    else:
        raise TypeError(f"expected a VisionTransformer or SwinTransformer of timm, got {_refusal(model)}")
    if attention_args.get("sr_ratio", 1) != 1:
        raise ValueError("expected no sr_ratio: a layer that reduces keys has no counterpart of the weights of qkv")

    mixers, kept, new, dropped = [], [], [], []
    for site in sites:
        old = site.block.attn
        mixer = _make_mixer(site, attention, attention_args)
        mixers.append(mixer)
        before, after = (dict(module.named_parameters(f"{site.name}.attn")) for module in (old, mixer))
        kept += [Parameters(name, p.numel()) for name, p in after.items() if p is before.get(name)]
        new += [Parameters(name, p.numel()) for name, p in after.items() if p is not before.get(name)]
        dropped += [Parameters(name, p.numel()) for name, p in before.items() if p is not after.get(name)]
        notes += [note for note in _losses(old) if note not in notes]

    total = sum(p.numel() for p in model.parameters())
    for site, mixer in zip(sites, mixers, strict=True):
        _install(model, site, mixer)
    untouched = total - sum(entry.number for entry in kept + dropped)
    names = [site.name for site in sites]
    return SwapReport(type(model).__name__, attention, names, kept, new, dropped, untouched, notes)


# Why classes of timm have no counterpart here.
_REASONS = {
    "SwinTransformerV2": "its cosine attention was trained for queries and keys of length one",
    "SwinTransformerV2Cr": "its cosine attention was trained for queries and keys of length one",
    "ResPostBlock": "its norms come after attention and MLP",
    "ParallelScalingBlock": "its attention and MLP share their projections",
    "ParallelThingsBlock": "it has several attentions side by side",
    "DiffParallelScalingBlock": "its attention and MLP share their projections",
    "DiffAttention": "it is the difference of two attentions",
    "AttentionRope": "it rotates queries and keys by their positions",
}


def _named(thing: Any) -> str:
    name = type(thing).__name__
    return f"{name}: {_REASONS[name]}" if name in _REASONS else name


def _refusal(model: Any) -> str:
    name = type(model).__name__
    for attribute in ("model", "module", "_orig_mod"):
        if isinstance(getattr(model, attribute, None), (VisionTransformer, SwinTransformer)):
            return f"{name} around one; try swap_attention(model.{attribute}, ...)"
    return _named(model)


def _vit_sites(model: VisionTransformer, depth: int | Sequence[int] | None) -> tuple[list[_Site], list[str]]:
    if model.dynamic_img_size:
        raise ValueError(
            "expected a model of one image size, got dynamic_img_size=True, with which blocks are not told the grid; "
            "try img_size=... without it, or set_input_size"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("expected patch_drop_rate 0, got patch dropout: the attention needs the whole map of tokens")
    grid = model.patch_embed.grid_size
    if grid is None:
        raise ValueError("expected a model with a grid of patches, got img_size=None; try img_size=224")
    number = len(model.blocks)
    depth = number if depth is None else depth
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= number:
        raise ValueError(f"expected depth from 1 to {number} for a VisionTransformer, got {depth}")
    sites = [_Site(f"blocks.{i}", b, tuple(grid), model.num_prefix_tokens) for i, b in enumerate(model.blocks[:depth])]
    for site in sites:
        _check_block(site, (Block, MixerBlock), Attention)
    return sites, ["the attention pool before the classifier is as it was."] if model.attn_pool is not None else []


def _swin_sites(model: SwinTransformer, depth: int | Sequence[int] | None) -> tuple[list[_Site], list[str]]:
    stages: Any = model.layers
    numbers = [len(stage.blocks) for stage in stages]
    depths = numbers if depth is None else depth
    fits = isinstance(depths, Sequence) and len(depths) == len(numbers) and all(isinstance(d, int) for d in depths)
    if not fits or not any(depths) or not all(0 <= d <= n for d, n in zip(depths, numbers, strict=True)):
        raise ValueError(f"expected depth of at most {numbers} for a SwinTransformer, per stage, got {depth}")
    sites = [
        _Site(f"layers.{i}.blocks.{j}", block, tuple(block.input_resolution), 0)
        for i, stage in enumerate(stages)
        for j, block in enumerate(stage.blocks[: depths[i]])
    ]
    for site in sites:
        _check_block(site, (SwinTransformerBlock, MapBlock), SwinAttention)
    return sites, ["the attention is over the whole map: these blocks have neither windows nor shift now."]


def _check_block(site: _Site, blocks: tuple[type, ...], attention: type) -> None:
    """The block, and the attention in it, are of the kinds that the new attention can stand in for."""
    if type(site.block) not in blocks:
        raise TypeError(f"expected a {blocks[0].__name__} of timm at {site.name}, got {_named(site.block)}")
    old = site.block.attn
    if type(old) is not attention and not isinstance(old, TokenMixer):
        raise TypeError(f"expected timm's {attention.__name__} at {site.name}.attn, got {_named(old)}")
    for name, option in (("norm", "scale_attn_norm"), ("gate", "gated")):
        if not isinstance(getattr(old, name, None), (nn.Identity, type(None))):
            raise ValueError(f"expected attention without {option} at {site.name}.attn: the new one has no such part")
    for name, layer in (("qkv", old.qkv), ("proj", old.proj)):
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"expected a linear layer at {site.name}.attn.{name}, got {type(layer).__name__}")
    dim = old.qkv.in_features
    if (old.qkv.out_features, old.proj.in_features, old.proj.out_features) != (3 * dim, dim, dim):
        raise ValueError(
            f"expected heads that together have the block's {dim} channels at {site.name}.attn, got "
            f"{old.proj.in_features}"
        )


def _make_mixer(site: _Site, attention: str, attention_args: dict[str, Any]) -> TokenMixer:
    """The new attention with the projections of the old one, which still has them too."""
    old = site.block.attn
    mixer = create_token_mixer(
        attention,
        old.qkv.in_features,
        old.num_heads,
        site.feat_size,
        num_prefix_tokens=site.num_prefix_tokens,
        qkv_bias=old.qkv.bias is not None,
        proj_drop=old.proj_drop.p,
        device=old.qkv.weight.device,
        dtype=old.qkv.weight.dtype,
        **attention_args,
    )
    mixer.qkv, mixer.proj = old.qkv, old.proj
    return mixer.train(old.training)


def _losses(old: Any) -> list[str]:
    """What the old attention did that no new one does, and that the names of its parameters do not tell."""
    notes = []
    if not isinstance(getattr(old, "q_norm", None), (nn.Identity, type(None))):
        notes.append("queries and keys were normalised (qk_norm) and are no longer.")
    if getattr(old, "attn_drop", None) is not None and old.attn_drop.p > 0:
        notes.append(f"dropout of attention weights ({old.attn_drop.p:g}) is gone.")
    return notes


def _install(model: nn.Module, site: _Site, mixer: TokenMixer) -> None:
    """Put the attention into the block and change the block's class, as `torch.nn.utils.parametrize` does.

    So the block is the same object with the same other modules, hooks and names of parameters.
    """
    block = site.block
    if isinstance(block, SwinTransformerBlock):
        block.__class__ = MapBlock
        block.shift_size = block.target_shift_size = (0, 0)
        block.attn_mask = None
        block.set_input_size(site.feat_size, site.feat_size)
    else:
        block.__class__ = MixerBlock
        block.patch_embed_of_model = [model.patch_embed]  # in a list, so that it is no submodule of the block
    block.attn = mixer
