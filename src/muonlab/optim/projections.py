"""Fused weights that can be told from their module: how a weight is turned and split into the matrices that it holds.

Only what names itself and fits in shape is split; anything else is said by an override. How transformers uses the product
(halves, thirds, every other output) is read from the attributes of its modules.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from muonlab.optim.views import View

# A gated unit and what follows it: the second has half as many inputs as the first has outputs.
GATED = {"gate_up_proj": "down_proj", "gate_up": "down", "Wi": "Wo", "w13": "w2", "input_linear": "output_linear"}


def linear_view(module: nn.Module, parent: nn.Module | None, name: str, rows: int) -> View:
    """How the rows (outputs) of a linear layer are split; () if it is one matrix.

    Args:
        module: the layer.
        parent, name: the module that holds it, and its name there.
        rows: its outputs.
    """
    sizes = getattr(module, "row_split", None)
    if sizes is None and parent is not None:
        following = getattr(parent, GATED.get(name, ""), None)
        if isinstance(following, nn.Linear) and rows == 2 * following.in_features:
            sizes = (rows // 2, rows // 2)
        if name == "qkv_proj":
            sizes = _grouped_attention(parent)
        width = getattr(parent, "split_size", None)
        if name == "c_attn" and isinstance(width, int):
            sizes = (width,) * (rows // width)  # GPT-2: queries, keys, values
    return (("split", 0, tuple(sizes)),) if sizes is not None and len(sizes) > 1 and sum(sizes) == rows else ()


def stack_view(module: nn.Module, name: str) -> View:
    """How a stack of experts `module.name` [n_experts, ...] is turned to [..., out, in] and split; () if it needs neither."""
    sizes = getattr(module, "row_split", None)
    if isinstance(sizes, Mapping):
        sizes = sizes.get(name)
    pairs = [
        (first, second)
        for a, b in GATED.items()
        if isinstance(first := getattr(module, a, None), Tensor)
        and isinstance(second := getattr(module, b, None), Tensor)
    ]
    plain = any(a.shape[1:] == (2 * b.shape[2], b.shape[1]) for a, b in pairs if a.ndim == b.ndim == 3)
    turned = any(a.shape[1:] == (b.shape[2], 2 * b.shape[1]) for a, b in pairs if a.ndim == b.ndim == 3)
    transposed = bool(getattr(module, "is_transposed", turned and not plain))
    view: View = (("transpose",),) if transposed else ()
    if sizes is not None:
        return (*view, ("split", 0, tuple(sizes)))
    if name not in GATED or not (turned if transposed else plain):
        return view
    if not getattr(module, "is_concatenated", True):
        return (*view, ("interleaved", 2))
    rows = getattr(module, name).shape[2 if transposed else 1]
    return (*view, ("split", 0, (rows // 2, rows // 2)))


def _grouped_attention(attention: nn.Module) -> tuple[int, ...] | None:
    """Widths of queries, keys and values of an attention that says how many heads they have, as Phi-3's does."""
    heads, width = getattr(attention, "num_key_value_heads", None), getattr(attention, "head_dim", None)
    output = getattr(attention, "o_proj", None)
    if isinstance(heads, int) and isinstance(width, int) and isinstance(output, nn.Linear):
        return output.in_features, heads * width, heads * width
    return None
