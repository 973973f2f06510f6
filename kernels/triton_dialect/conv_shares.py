"""The end of signsplit_conv2d_fwd: what is stored of each output, and where."""

from __future__ import annotations

import triton
import triton.language as tl

from lrp_compiler.kernels.triton_dialect.conv_tiles import load_pixels, pixels_of, place_of, store_pixels
from lrp_compiler.kernels.triton_dialect.shares import alpha_beta_ratios, gamma_ratio, packed, rounded, z_plus_ratio


@triton.jit
def write_shares(
    z0, u, c, bias, z, ratio, aside,
    tile, first_output, group, pixels, plane, out_width, outputs, all_outputs, bias_stride,
    c_n, c_c, c_h, c_w, z_n, z_c, z_h, z_w, first, second, epsilon,
    METHOD: tl.constexpr, C_ALONG: tl.constexpr, Z_ALONG: tl.constexpr,
    BLOCK_PIXEL: tl.constexpr, BLOCK_CHANNEL: tl.constexpr,
):  # fmt: skip
    """What is stored of a (pixel, channel) tile of z0 and u."""
    image, row, column, is_pixel = pixels_of(tile, pixels, plane, out_width, BLOCK_PIXEL)
    within = first_output + tl.arange(0, BLOCK_CHANNEL)
    is_output = within < outputs
    output = (group * outputs + within).to(tl.int64)
    offset = tl.zeros((BLOCK_CHANNEL,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + output * bias_stride, mask=is_output, other=0.0).to(tl.float32)
    offset = offset[None, :]
    if z is None:
        full = z0 + offset
    else:
        full = load_pixels(z, place_of(image, row, column, z_n, z_h, z_w), output * z_c, is_pixel, is_output, Z_ALONG)
        z0 = full - offset
    c_place = place_of(image, row, column, c_n, c_h, c_w)
    place = (tile * BLOCK_PIXEL + tl.arange(0, BLOCK_PIXEL)).to(tl.int64) * all_outputs
    dtype: tl.constexpr = ratio.dtype.element_ty
    # Shares of R / c first: they take the registers of both sums before the coefficient needs any.
    if METHOD == "z_plus":
        share = z_plus_ratio(full, z0, u, offset, epsilon)
    elif METHOD == "alpha_beta":
        share, other = alpha_beta_ratios(full, z0, u, offset, first, second, epsilon)
        other *= load_pixels(c, c_place, output * c_c, is_pixel, is_output, C_ALONG)
        store_pixels(aside, place, output, is_pixel, is_output, rounded(other, dtype), 0)
    else:
        share = gamma_ratio(full, full, z0, u, offset, first, epsilon)
        signs = tl.trans(packed(tl.trans((full < 0) & is_pixel[:, None]), BLOCK_CHANNEL, BLOCK_PIXEL))
        eight = tile * (BLOCK_PIXEL // 8) + tl.arange(0, BLOCK_PIXEL // 8)
        where = (eight * 8 < pixels)[:, None] & is_output[None, :]
        tl.store(aside + (eight.to(tl.int64) * all_outputs)[:, None] + output[None, :], signs, mask=where)
    share *= load_pixels(c, c_place, output * c_c, is_pixel, is_output, C_ALONG)
    store_pixels(ratio, place, output, is_pixel, is_output, rounded(share, dtype), 0)
