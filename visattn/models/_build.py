"""How every model is built: arguments that could only fail later are refused, and so are weights that do not fit."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from timm.models import _factory, build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from visattn.published import fetch
from visattn.weights import ChecksWeights, WeightsError, check_file, first_line, load_fitting, load_weights

M = TypeVar("M", bound=nn.Module)

# Words for `global_pool`. Without any, a linear layer classifies every position, where its channels come last.
NCHW_POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
NHWC_POOLS = ("", *NCHW_POOLS)
NORM_MLP_POOLS = ("", "avg", "max", "avgmax", "fast", "fastavg", "fastmax", "fastavgmax")
TOKEN_POOLS = ("", "token", "avg", "avgmax", "max")

# What constructors and the readers of weights raise for what they did not expect.
_RAW = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Arguments of timm's constructors, to which families hand them on.
_SHARED = {"in_chans": int, "num_classes": int, "drop_rate": float, "drop_path_rate": float}
_POSITIVE = {"img_size", "in_chans", "patch_size", "num_heads", "layers"}
_PER_STAGE = {"depths", "layers", "embed_dims", "channels", "num_heads", "mlp_ratios", "sr_ratios", "split_sizes"}


def check_classifier(num_classes: int, global_pool: str | None, pools: Sequence[str]) -> None:
    """Refuse a classifier that would fail in forward; pooling that is kept (None) is left alone, as timm's tests want.

    Raises:
        ValueError: A number of classes below 0, or pooling that is not in `pools`; without classes it may be "".
    """
    if not _is_int(num_classes) or num_classes < 0:
        raise ValueError(f"expected num_classes of 0 or more, got {reprlib.repr(num_classes)}; try 1000")
    if global_pool is not None and global_pool not in pools and (num_classes > 0 or global_pool != ""):
        words = ", ".join(repr(word) for word in pools)
        hint = ", or num_classes=0 without pooling" if global_pool == "" else ""
        raise ValueError(f"expected global_pool of {words}, got {reprlib.repr(global_pool)}; try 'avg'{hint}")


def build_model(
    cls: type[M],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Any], M], dict[str, Tensor]],
    levels: int | tuple[int, ...],
    features: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> M:
    """timm's `build_model_with_cfg` for a family; `levels` are those of `features_only`.

    Raises:
        ValueError: Arguments of the wrong type or range, or that the constructor fails on.
        TypeError: Arguments that the constructor does not have.
        WeightsError: `pretrained` weights that are damaged, unsafe, or of another model.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    if pretrained:
        if cfg.source == "local-dir" and cfg.file:
            for file in Path(cfg.file).glob("*.[bp]*"):  # .bin, .pt, .pth
                check_file(file, f"weights of {variant}", "another copy")
        elif not cfg.state_dict:
            weights = load_weights(Path(cfg.file) if cfg.file else fetch(cfg, kwargs.get("cache_dir")))
            filter_fn = partial(_convert, weights, filter_fn)
            # timm copies what its configuration holds several times, so there is only a word in it
            kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": {"read": True}, "source": None}
    try:
        model: Any = build_model_with_cfg(
            partial(_construct, cls),
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": levels, "feature_cls": "getter", **(features or {"flatten_sequential": True})},
            **kwargs,
        )
    except (AttributeError, LookupError) as error:
        if not pretrained:
            raise
        raise WeightsError(f"expected weights of {variant}, got {first_line(error)}; try other weights") from error
    if pretrained:
        model.pretrained_cfg |= {"state_dict": None, "source": cfg.source}  # where they came from is enough
    return model


def _convert(
    weights: dict[str, Tensor], filter_fn: Callable[[dict[str, Any], M], dict[str, Tensor]], _: Any, model: M
) -> dict[str, Tensor]:
    return filter_fn(weights, model)


def _construct(cls: type[nn.Module], **kwargs: Any) -> nn.Module:
    _check_arguments(cls, kwargs)
    if "output_stride" in kwargs and not {"output_stride", "kwargs"} & signature(cls).parameters.keys():
        raise TypeError(
            f"expected no output_stride for {cls.__name__}, whose maps all have the stride of its patches, got "
            f"{reprlib.repr(kwargs['output_stride'])}; try patch_size"
        )
    try:
        model = cls(**kwargs)
    except torch.OutOfMemoryError:
        raise
    except _RAW as error:
        if first_line(error).startswith("expected ") or "; try " in str(error):
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"expected arguments that {cls.__name__} can be built with, got others ({type(error).__name__}: "
            f"{first_line(error)}); try the defaults"
        ) from error
    empty = [f"{name} {[*p.shape]}" for name, p in model.named_parameters() if not p.numel()]
    if empty:
        raise ValueError(f"expected sizes of 1 or more for {cls.__name__}, got an empty {empty[0]}; try the defaults")
    _check_stages(cls, kwargs)
    return model


def _check_arguments(cls: type[nn.Module], kwargs: dict[str, Any]) -> None:
    """Types as annotated, and ranges by name."""
    hints = {**_SHARED, **get_type_hints(cls.__init__)}
    for name, value in kwargs.items():
        if name in hints and not (_fits(value, hints[name]) and _in_range(name, value)):
            hint = str(hints[name]) if get_args(hints[name]) else hints[name].__name__
            limit = " from 0 to 1" if name.endswith("_rate") else " above 0" if _is_positive(name) else ""
            raise ValueError(
                f"expected {name} of type {hint.replace('collections.abc.', '')}{limit}, got {reprlib.repr(value)}; "
                "try without it, for the default"
            )


def _check_stages(cls: type[nn.Module], kwargs: dict[str, Any]) -> None:
    """As many entries per stage as there are stages, where a constructor would leave some out in silence."""
    default = signature(cls).parameters.get("depths")
    stages = kwargs.get("depths", kwargs.get("layers", default and default.default))
    for name in _PER_STAGE & kwargs.keys() if stages else ():
        if len(kwargs[name]) != len(stages):
            raise ValueError(f"expected {len(stages)} {name}, one per stage, got {len(kwargs[name])}; try other depths")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    """A value is what a type hint says, for the hints that constructors have; classes may stand for their names."""
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if kind is Sequence or kind is tuple:
        if isinstance(value, str):
            return args == (str,)
        return hasattr(value, "__len__") and not isinstance(value, Mapping) and all(_fits(v, args[0]) for v in value)
    if hint is bool:
        return isinstance(value, bool) or (_is_int(value) and value in (0, 1))
    if hint is int:
        return _is_int(value)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint is str or kind is type:
        return isinstance(value, str) or callable(value)
    if hint is type(None):
        return value is None
    return not isinstance(kind or hint, type) or isinstance(value, kind or hint)


def _in_range(name: str, value: Any) -> bool:
    values = value if hasattr(value, "__len__") else [value]
    if value is None or isinstance(value, str):
        return True
    if name.endswith("_rate"):
        return 0 <= value <= 1
    if name.endswith("_eps"):
        return value >= 0
    if name == "img_size" and values is value and len(value) != 2:
        return False
    return not _is_positive(name) or all(v > 0 for v in values)


def _is_positive(name: str) -> bool:
    return name in _POSITIVE or name.endswith(("_ratio", "_ratios"))


def _read_checkpoints_safely() -> None:
    """Let `timm.create_model(OURS, checkpoint_path=...)` read files as this package does.

    timm calls nothing of the model's before it has read the file; for other models it goes on as before.
    """
    theirs = getattr(_factory, "load_checkpoint", None)
    if theirs is None:
        return

    @wraps(theirs)
    def load_checkpoint(model: nn.Module, checkpoint_path: str | Path, **kwargs: Any) -> Any:
        if not any(isinstance(module, ChecksWeights) for module in model.modules()):
            return theirs(model, checkpoint_path, **kwargs)
        weights = load_weights(Path(checkpoint_path))
        return load_fitting(model, weights, f"weights of {type(model).__name__}", str(checkpoint_path))

    # pyrefly: ignore[bad-assignment]: the names of timm's further arguments do not matter here
    _factory.load_checkpoint = load_checkpoint


_read_checkpoints_safely()
