"""Complex values as pairs of real numbers: a linear map through them is the real matrix it computes.

A coefficient c of a complex value a holds that of its real part and that of its imaginary part, R = Re(conj(c) a) is
the relevance of both. The oracles here build matrices column by column from unit vectors and know no complex
derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functions import Op
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, composites, errors, patch_effects, rules

TOLERANCE = 1e-10
"""Of the largest expected relevance, in float64."""

EPSILON = 0.1


pytestmark = pytest.mark.usefixtures("float64")


def complex_randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


def pairs(x: Tensor) -> Tensor:
    """All real numbers in ``x`` as a vector."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).flatten()


def matrix(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The real matrix (outputs, inputs) of a map that is linear in the real numbers of ``x``, without its offset."""
    offset = pairs(fn(torch.zeros_like(x)))
    columns = []
    for place in range(pairs(x).numel()):
        unit = torch.zeros(pairs(x).numel())
        unit[place] = 1
        basis = torch.view_as_complex(unit.view(*x.shape, 2)) if x.is_complex() else unit.view(x.shape)
        columns.append(pairs(fn(basis)) - offset)
    return torch.stack(columns, 1)


def by_matrix(fn: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor) -> Tensor:
    """Each real number of ``x`` times the matrix's transpose of the seed; both parts of a complex number added."""
    found = pairs(x) * (matrix(fn, x).T @ pairs(seed))
    return found.view(*x.shape, -1).sum(-1)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and not found.is_complex()
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


# --- linear maps --------------------------------------------------------------------------------------------

WINDOW = torch.hann_window(8, dtype=torch.float64)


def spectral_layer(x: Tensor, weight: Tensor) -> Tensor:
    """The Fourier neural operator's layer in one dimension."""
    spectrum = torch.fft.rfft(x)
    kept = torch.zeros(x.shape[0], weight.shape[1], x.shape[-1] // 2 + 1, dtype=torch.complex128)
    kept[:, :, : weight.shape[2]] = torch.einsum("bix,iox->box", spectrum[:, :, : weight.shape[2]], weight)
    return torch.fft.irfft(kept, n=x.shape[-1])


def spectral_layer_2d(x: Tensor, weight: Tensor) -> Tensor:
    """As in two dimensions: negative frequencies of the first axis have weights of their own."""
    rows, columns = weight.shape[-2:]
    spectrum = torch.fft.rfft2(x)
    kept = torch.zeros(x.shape[0], weight.shape[2], x.shape[-2], x.shape[-1] // 2 + 1, dtype=torch.complex128)
    kept[:, :, :rows, :columns] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :rows, :columns], weight[0])
    kept[:, :, -rows:, :columns] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -rows:, :columns], weight[1])
    return torch.fft.irfft2(kept, s=x.shape[-2:])


def spectrogram_and_back(x: Tensor) -> Tensor:
    return torch.istft(torch.stft(x, 8, 4, window=WINDOW, return_complex=True), 8, 4, window=WINDOW)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions as products of complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a random value."""


def real(*shape: int) -> Kind:
    return shape, torch.float64


def pair(*shape: int) -> Kind:
    return shape, torch.complex128


LINEAR_MAPS: dict[str, tuple[Callable[..., Tensor], Kind, tuple[Kind, ...]]] = {
    "spectral_layer_even": (spectral_layer, real(2, 3, 8), (pair(3, 2, 3),)),
    "spectral_layer_odd": (spectral_layer, real(2, 3, 7), (pair(3, 2, 4),)),
    "spectral_layer_2d": (spectral_layer_2d, real(2, 2, 6, 7), (pair(2, 2, 2, 2, 3),)),
    "rfft_of_even": (torch.fft.rfft, real(2, 6), ()),
    "rfft_of_odd_padded": (lambda x: torch.fft.rfft(x, n=9, norm="ortho"), real(2, 6), ()),
    "rfftn_over_first_dims": (lambda x: torch.fft.rfftn(x, dim=(1, 0), norm="forward"), real(4, 5, 2), ()),
    "irfft_of_even": (lambda z: torch.fft.irfft(z, n=6), pair(2, 4), ()),
    "irfft_of_odd_truncated": (lambda z: torch.fft.irfft(z, n=5, norm="ortho"), pair(2, 6), ()),
    "irfft2": (lambda z: torch.fft.irfft2(z, s=(3, 6), norm="forward"), pair(2, 3, 4), ()),
    "fft": (torch.fft.fft, pair(2, 5), ()),
    "fft_of_real": (lambda x: torch.fft.fft(x).imag, real(2, 5), ()),
    "ifft2_shifted": (lambda z: torch.fft.fftshift(torch.fft.ifft2(z, norm="ortho")), pair(2, 3, 4), ()),
    "hfft": (lambda x: torch.fft.hfft(torch.fft.ihfft(x), n=6), real(2, 6), ()),
    "spectrogram_and_back": (spectrogram_and_back, real(2, 24), ()),
    "linear": (F.linear, pair(2, 4), (pair(3, 4), pair(3))),
    "conv1d": (F.conv1d, pair(2, 2, 6), (pair(3, 2, 3),)),
    "matmul_from_the_left": (lambda z, w: w @ z, pair(4, 3), (pair(2, 4),)),
    "matmul_with_adjoint": (lambda z, w: z @ w.mH, pair(2, 4), (pair(3, 4),)),
    "mul": (torch.mul, pair(2, 4), (pair(4),)),
    "mul_of_real": (torch.mul, real(2, 4), (pair(4),)),
    "div": (torch.div, pair(2, 4), (pair(4),)),
    "add_constant": (torch.add, pair(2, 4), (pair(4),)),
    "conj_and_parts": (lambda z: z.conj().imag + 2 * z.real - (3j * z).conj().real, pair(2, 4), ()),
    "made_of_parts": (lambda x: torch.complex(x[:, :2], x[:, 2:]), real(2, 4), ()),
    "made_with_constant": (lambda x, k: torch.complex(k, x), real(2, 4), (real(2, 4),)),
    "cast": (lambda x: (x.to(torch.complex128) * 1j).imag.to(torch.complex128), real(2, 4), ()),
    "rotary": (rotated, real(2, 6), (real(3),)),
}


def made(name: str) -> tuple[Op, Tensor]:
    """The module of a linear map and an input."""
    fn, kind, constants = LINEAR_MAPS[name]
    x, *weights = (torch.randn(shape, dtype=dtype) for shape, dtype in (kind, *constants))
    return Op(fn, *weights), x


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_a_linear_map_through_complex_numbers_is_its_real_matrix(name: str, reference: bool) -> None:
    """LRP-0 on the matrix: also input times gradient, whatever lies in between."""
    model, x = made(name)
    seed = torch.randn_like(model(x).detach())
    expected = by_matrix(model, x, seed).detach()
    for composite in ("attnlrp", "input_x_gradient"):
        explained = compile_for_lrp(model, composite, reference=reference)
        assert torch.equal(explained(x), model(x))
        found = explained.run(x)[1].relevance(seed)
        assert_same(found, expected)


@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_ledgers_of_complex_values_close(name: str) -> None:
    model, x = made(name)
    output, tape = compile_for_lrp(model, "epsilon_plus").run(x)
    seed = torch.randn_like(output)
    ledger = tape.ledger(seed)
    assert all(row.relative_gap <= TOLERANCE for row in ledger.rows)
    assert ledger.seed == pytest.approx((pairs(seed) * pairs(output)).sum().item())
    assert ledger.gap == pytest.approx(0, abs=TOLERANCE * abs(ledger.seed))
    assert all(not sink.is_complex() for kinds in tape.sinks(seed).values() for sink in kinds.values())


@pytest.mark.parametrize("reference", [False, True])
def test_epsilon_shrinks_a_complex_share_and_keeps_its_angle(reference: bool) -> None:
    """c z / (z + epsilon z / |z|): the size of z is stabilised, so that shifting a signal shifts its relevance."""
    x, weight = complex_randn(2, 4), complex_randn(3, 4)
    z = x @ weight.T
    seed = complex_randn(2, 3)
    shrunk = seed * z.abs() / (z.abs() + EPSILON)
    explained = compile_for_lrp(Op(F.linear, weight), composites.epsilon(EPSILON), reference=reference)
    found = explained.run(x)[1].relevance(seed)
    contributions = x.unsqueeze(1) * weight
    assert_same(found, (shrunk.conj().unsqueeze(2) * contributions).real.sum(1))


# --- what is not linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
def test_products_of_complex_values_share_evenly(reference: bool) -> None:
    """R_a = R_b = R / 2 elementwise: Re(conj(c b*/2) a) = Re(conj(c) a b) / 2."""
    a, b, seed = complex_randn(2, 3), complex_randn(2, 3), complex_randn(2, 3)
    explained = compile_for_lrp(Op(torch.mul), "attnlrp", reference=reference)
    found = explained.run(a, b)[1].relevance(seed)
    half = (seed.conj() * a * b).real / 2
    for relevance in found.values():
        assert_same(relevance, half)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "square": torch.square,
    "cube": lambda z: z.pow(3),
    "exp": torch.exp,
    "shrunk_by_size": lambda z: z / z.abs() * torch.relu(z.abs() - 0.1),
    "divided_by_norm": lambda z: z / torch.linalg.vector_norm(z, dim=-1, keepdim=True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_complex_values_pass_relevance_on(name: str) -> None:
    """R_x = R_y of either number; what a constant in between takes is named."""
    fn = ACTIVATIONS[name]
    z = complex_randn(2, 4)
    output, tape = compile_for_lrp(Op(fn), "attnlrp").run(z)
    seed = torch.randn_like(output)
    relevance = (seed.conj() * output).real
    sunk = tape.sinks(seed)
    if "shrunk" in name:
        sunk = {"sub": {"constant": sunk["sub"]["constant"]}}
        assert_same(tape.relevance(seed) + sunk["sub"]["constant"], relevance)
    else:
        assert_same(tape.relevance(seed), relevance)


def test_autograd_and_the_gradient_composite_agree_on_complex_values() -> None:
    """Torch's gradient of a complex leaf is dL/dRe + i dL/dIm, which is the coefficient."""

    def fn(z: Tensor) -> Tensor:
        return torch.fft.irfft(torch.tanh(torch.fft.fft(z)[:, :4]) * z[:, :4].conj(), n=6)

    z = complex_randn(2, 6)
    leaf = z.clone().requires_grad_()
    output = fn(leaf)
    seed = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, leaf, seed)
    tape = compile_for_lrp(Op(fn), "gradient").run(z)[1]
    torch.testing.assert_close(tape.relevance(seed), gradient, rtol=1e-12, atol=1e-12)
    tape = compile_for_lrp(Op(fn), "input_x_gradient").run(z)[1]
    assert_same(tape.relevance(seed), (gradient.conj() * z).real)


def test_differences_of_complex_values_are_complete() -> None:
    """DeepLIFT through a spectrum and a product of two: relevance adds up to the change of the output."""
    x, weight = torch.randn(2, 3, 8), complex_randn(3, 2, 3)

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return spectral_layer(x, weight) * spectral_layer(x.flip(-1), weight)

    model = Op(fn, weight)
    baseline = torch.randn(1, 3, 8)
    output, tape = compile_for_lrp(model, "deep_lift").run(x, baselines=baseline)
    seed = torch.randn_like(output)
    change = seed * (output - model(baseline.expand_as(x)))
    torch.testing.assert_close(tape.relevance(seed).sum((1, 2)), change.sum((1, 2)).detach(), rtol=1e-9, atol=1e-12)


# --- readings, seeds, refusals ------------------------------------------------------------------------------


def test_relevance_at_frequencies() -> None:
    """At a complex site relevance is real and conserved, coefficients are complex, and masks choose frequencies."""
    x, weight = torch.randn(2, 3, 8), complex_randn(3, 2, 3)
    output, tape = compile_for_lrp(Op(spectral_layer, weight), "attnlrp").run(x)
    seed = torch.randn_like(output)
    spectrum = torch.fft.rfft(x)
    relevance = tape.relevance(seed, at="_fft_r2c")
    coefficient = tape.coefficients(seed, at="_fft_r2c")
    assert_same(relevance, (coefficient.conj() * spectrum).real)
    assert relevance.sum().item() == pytest.approx((seed * output).sum().item())
    assert (relevance[..., 3:] == 0).all()
    first = torch.arange(5) == 1

    def of_first(v: Tensor) -> Tensor:
        return spectral_layer(torch.fft.irfft(torch.where(first, torch.fft.rfft(v), 0), n=8), weight)

    assert_same(tape.relevance(seed, through={"_fft_r2c": first}), by_matrix(of_first, x, seed))
    each = tape.relevance_of_each([seed, 2 * seed], at="_fft_r2c")
    torch.testing.assert_close(each[1], 2 * relevance)


def test_relevance_of_complex_parameters() -> None:
    """A spectral weight's relevance is real and, the layer being bilinear, that of its input once more."""
    x, weight = torch.randn(2, 3, 8), complex_randn(3, 2, 3)
    output, tape = compile_for_lrp(Op(spectral_layer, weight), "attnlrp").run(x)
    seed = torch.randn_like(output)
    (found,) = tape.parameters(seed).values()
    assert_same(found, by_matrix(lambda w: spectral_layer(x, w), weight, seed))


def test_a_seed_of_one_explains_the_real_part_and_of_i_the_imaginary() -> None:
    z = complex_randn(2, 4)
    explained = compile_for_lrp(Op(torch.fft.fft), "attnlrp")
    tape = explained.run(z)[1]
    output = torch.fft.fft(z)
    assert tape.relevance(2).sum(1) == pytest.approx(output[:, 2].real)
    seed = torch.zeros_like(output)
    seed[:, 2] = 1j
    assert tape.relevance(seed).sum(1) == pytest.approx(output[:, 2].imag)
    assert tape.relevance(lambda out: out[:, 2].imag).sum(1) == pytest.approx(output[:, 2].imag)
    with pytest.raises(errors.TargetError, match="is complex"):
        tape.relevance(lambda out: out[:, 2])
    with pytest.raises(errors.TargetError, match="a complex seed is for a complex output"):
        compile_for_lrp(Op(torch.abs), "attnlrp").run(z)[1].relevance(seed)


def test_patching_a_spectrum_of_a_linear_model_changes_the_metric_by_its_effects() -> None:
    spectrum, back = Op(torch.fft.rfft), Op(lambda z: torch.fft.irfft(z, n=8))
    model = nn.Sequential(spectrum, back)
    clean, corrupted = torch.randn(1, 8), torch.randn(1, 8)
    effects = patch_effects(
        compile_for_lrp(model, "attnlrp"), clean, corrupted, lambda out: out[:, 3], ["0"], reduce="none"
    )
    assert effects["0"].sum().item() == pytest.approx((clean - corrupted)[0, 3].item())


def test_composites_split_real_maps_by_sign_and_give_complex_ones_epsilon() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), Op(spectral_layer, complex_randn(3, 2, 3)))
    report = compile_for_lrp(model, "epsilon_plus").report(torch.randn(2, 3, 8))
    assert report.rules["aten::conv1d", "z_plus"] == 1 and report.rules["aten::bmm", "epsilon(1e-06)"] == 1


def test_a_rule_for_real_numbers_is_refused_at_complex_ones() -> None:
    line = (rules.on(rules.OpClass.LINEAR), rules.Gamma(gamma=0.25))
    gamma = composites.attnlrp().override(line, name="all_gamma")
    explained = compile_for_lrp(Op(F.linear, complex_randn(3, 4)), gamma)
    with pytest.raises(errors.UncoveredOpsError, match=r"linear \(complex, while the rule 'gamma\(0.25\)' is for real"):
        explained.run(complex_randn(2, 4))


def test_relevance_of_complex_values_can_be_differentiated() -> None:
    """The relevance pass is W^T and its own transpose W, so that W x is the output again."""
    x, weight = torch.randn(2, 3, 8), complex_randn(3, 2, 3)
    output, tape = compile_for_lrp(Op(spectral_layer, weight), "linear_interpreter").run(x)
    linearised = tape.linearised()
    torch.testing.assert_close(linearised.apply({"inputs_0": x}), output.detach(), rtol=1e-12, atol=1e-12)
