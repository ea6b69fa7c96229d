"""model, its first layer: a first convolution for grey images that gives what replicated RGB would have given.

The reference is the RGB network fed with the grey image g in all three channels, each normalised by its own
(mean_c, std_c) and then zero-padded: ``sum_c conv(W_c, (g - mean_c) / std_c)``. Grey images are normalised by
one (m, s), so g = m + s·x, and the sum becomes

    conv(W', x) + conv(O, 1),    W' = s · sum_c W_c / std_c,    O = sum_c W_c · (m - mean_c) / std_c,

with x and the image of ones both zero-padded. The second term is constant inside the image, smaller at its
borders; a bias could not say that. (Derived here; equal up to rounding for every kernel, stride and image size.)
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from medtl_dist.models.normalise import Normalisation


class GreyConv2d(nn.Conv2d):
    """``conv(weight, x) + conv(offset, ones)`` for x float [batch, 1, height, width], zero-padded.

    Parameters: ``weight`` and ``offset``, each [out_channels, 1, kernel, kernel]; ``bias`` if the original had one.
    With ``tensorflow_padding`` the padding follows the input's size, as in networks that were trained in TensorFlow.
    """

    offset: nn.Parameter
    tensorflow_padding: bool = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is nn.Conv2d's)
        # One convolution over two channels: half the time of two convolutions forward and backward (CPU, 224 px).
        return self.forward_with(input, torch.cat([self.weight, self.offset], dim=1), self.bias)

    def forward_with(self, input: Tensor, both_weights: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        """The same with ``both_weights`` [out_channels, 2, kernel, kernel], weight and offset, given from outside."""
        both = torch.cat([input, torch.ones_like(input)], dim=1)
        if self.tensorflow_padding:
            both = nn.functional.pad(both, tensorflow_padding(both, self))
        return self._conv_forward(both, both_weights, bias)


def grey_conv(conv: nn.Conv2d, rgb: Normalisation, grey: Normalisation) -> GreyConv2d:
    """A grey twin of the RGB convolution ``conv``, in its dtype and on its device; ``conv`` is left unchanged.

    Args:
        conv: 3 input channels, 1 group, zero padding; a plain convolution, or timm's with TensorFlow's padding.
        rgb: what the three replicated channels would have been normalised with.
        grey: what the one channel is normalised with.
    """
    if conv.in_channels != 3 or conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(f"the first convolution must have 3 input channels, 1 group and zero padding, not {conv}")
    same = pads_like_tensorflow(conv)
    if type(conv) is not nn.Conv2d and not same:  # it may do more with its weights than convolve
        raise ValueError(f"the first convolution must be a plain nn.Conv2d, not {type(conv).__name__}")
    weight, offset = grey_from_rgb(conv.weight.detach(), rgb, grey)
    # nn.Module's own constructor would draw (and throw away) random numbers; on "meta" it draws none.
    twin = GreyConv2d(
        1,
        conv.out_channels,
        cast(tuple[int, int], conv.kernel_size),
        cast(tuple[int, int], conv.stride),
        cast(tuple[int, int], conv.padding),
        cast(tuple[int, int], conv.dilation),
        bias=conv.bias is not None,
        device="meta",
    )
    twin.tensorflow_padding = same
    twin.weight = nn.Parameter(weight)
    twin.offset = nn.Parameter(offset)
    if conv.bias is not None:
        twin.bias = nn.Parameter(conv.bias.detach().clone())
    return twin.train(conv.training)


def grey_from_rgb(weight: Tensor, rgb: Normalisation, grey: Normalisation) -> tuple[Tensor, Tensor]:
    """``weight`` float [out, 3, kh, kw] → (W', O), each [out, 1, kh, kw], summed in float64, in ``weight``'s dtype."""
    wide = weight.to(torch.float64)
    mean, std = _per_channel(rgb, wide)
    per_std = wide / std
    grey_weight = grey.std[0] * per_std.sum(dim=1, keepdim=True)
    offset = (per_std * (grey.mean[0] - mean)).sum(dim=1, keepdim=True)
    return grey_weight.to(weight.dtype), offset.to(weight.dtype)


def rgb_from_grey(weight: Tensor, offset: Tensor, rgb: Normalisation, grey: Normalisation) -> Tensor:
    """(W', O), each float [out, 1, kh, kw] → RGB weight [out, 3, kh, kw] that acts on replicated grey as they do.

    With u_c = W_c / std_c and d_c = m - mean_c, two equations hold per tap: sum u_c = W'/s and sum u_c·d_c = O. Of the
    solutions this is the one of least norm. Where all d_c are equal (one normalisation for all channels), the second
    follows from the first or cannot be met: then O is left out.
    """
    wide, wide_offset = weight.to(torch.float64), offset.to(torch.float64)
    mean, std = _per_channel(rgb, wide)
    distance = grey.mean[0] - mean
    centred = distance - distance.mean()
    equal_shares = (wide / grey.std[0] / 3).expand(-1, 3, -1, -1)
    spread = centred.square().sum()
    if spread > 1e-12:
        rest = wide_offset - (equal_shares * distance).sum(dim=1, keepdim=True)
        equal_shares = equal_shares + rest * centred / spread
    return (equal_shares * std).to(weight.dtype)


def pads_like_tensorflow(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` is timm's convolution with TensorFlow's padding (told by its name: timm need not be installed)."""
    return type(conv).__name__ == "Conv2dSame"


def tensorflow_padding(images: Tensor, conv: nn.Conv2d) -> list[int]:
    """(left, right, top, bottom) so that the output has ceil(size / stride) pixels; an odd one goes right and below."""
    padding: list[int] = []
    for axis in (1, 0):
        size, stride = images.shape[2 + axis], conv.stride[axis]
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        padding += [total // 2, total - total // 2]
    return padding


def _per_channel(rgb: Normalisation, like: Tensor) -> tuple[Tensor, Tensor]:
    if rgb.channels != 3:
        raise ValueError(f"the RGB normalisation needs 3 channels, not {rgb.channels}")
    return like.new_tensor(rgb.mean).view(1, 3, 1, 1), like.new_tensor(rgb.std).view(1, 3, 1, 1)
