"""Fitting modes to filters: exact for sums of as many modes, true errors, and better with more modes."""

import itertools
import math

import pytest
import torch

from hf_archs_hyena import modal_fitting
from hf_archs_hyena.modal_fitting import fit_modal_filters
from hf_archs_hyena.ops.modal import modal_taps


def modal(channels, modes, length, dtype=torch.float64):
    """Taps of random modes, one in each channel with a real pole."""
    log_decay = torch.rand(channels, modes, dtype=torch.float64) * 5 - 5
    phase = torch.rand(channels, modes, dtype=torch.float64) * 3
    phase[:, 0] = 0
    residues = torch.randn(channels, modes, 2, dtype=torch.float64)
    return modal_taps(log_decay, phase, residues, length).to(dtype)


def implicit(channels, length, frequency=6.0):
    """Filters like Hyena's at the start of training: a network of sines under decaying windows."""
    t = torch.linspace(0, 1, length).unsqueeze(1)
    z = torch.cat([t, torch.cos(2 * math.pi * t), -torch.sin(2 * math.pi * t)], 1)
    for size in (3, 32, 32):
        z = torch.sin(frequency * z @ torch.empty(size, 32).uniform_(-1, 1) / size**0.5)
    rates = torch.linspace(3, 15, channels)
    return (z @ torch.randn(32, channels) * (torch.exp(-t * rates) + 0.05)).t()


def true_error(taps, log_decay, phase, residues):
    """Taps by the definition, with complex powers, independent of `modal_taps`."""
    poles = torch.exp(torch.complex(-log_decay.double().exp(), phase.double()))
    weights = torch.view_as_complex(residues.double())
    found = (weights[..., None] * poles[..., None] ** torch.arange(taps.shape[1])).real.sum(1)
    return (found - taps).norm(dim=1) / taps.double().norm(dim=1)


@pytest.mark.parametrize(("length", "modes", "given"), [(200, 4, 4), (900, 8, 8), (5000, 4, 4), (600, 3, 6)])
def test_a_sum_of_modes_is_recovered(length, modes, given):
    taps = modal(6, modes, length)
    *parameters, error = fit_modal_filters(taps, given)
    assert error.max() < 1e-5
    assert true_error(taps, *parameters).max() < 1e-5


def test_poles_themselves_are_recovered():
    log_decay, phase = torch.tensor([[-3.0, -4.0]]), torch.tensor([[0.3, 1.2]])
    residues = torch.tensor([[[1.0, 0.5], [-2.0, 0.1]]])
    found = fit_modal_filters(modal_taps(log_decay, phase, residues, 500).double(), 2)
    order = found[1][0].argsort()
    for name, a, b in zip(("log_decay", "phase", "residues"), found, (log_decay, phase, residues)):
        torch.testing.assert_close(a[:, order].float(), b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("length", [200, 3000])
def test_the_error_is_true_and_falls_with_more_modes(length):
    taps = implicit(4, length)
    errors = []
    for modes in (2, 6, 14):
        *parameters, error = fit_modal_filters(taps, modes)
        assert [t.dtype for t in parameters] == [torch.float32] * 3
        assert error.dtype == torch.float64
        torch.testing.assert_close(error, true_error(taps, *parameters), rtol=1e-4, atol=1e-6)
        errors.append(error.mean())
    assert all(later < 0.9 * before for before, later in itertools.pairwise(errors)), errors
    assert errors[0] < 1
    assert errors[-1] < 0.3, errors


def test_a_fit_is_no_worse_than_the_best_state_says():
    """A fit is near the bound of states of its size: the part of the Hankel matrix beyond 2 n singular values."""
    taps = implicit(4, 256).double()
    hankel = torch.nn.functional.pad(taps, (0, 256)).unfold(1, 256, 1)[:, :256]
    values = torch.linalg.svdvals(hankel).square()
    for modes in (4, 10):
        bound = (values[:, 2 * modes :].sum(1) / values.sum(1)).sqrt()
        assert (fit_modal_filters(taps, modes)[3] < 1.2 * bound).all()


def test_refinement_helps(monkeypatch):
    taps = implicit(4, 300)
    fitted = fit_modal_filters(taps, 4)[3]
    monkeypatch.setattr(modal_fitting, "ITERATIONS", 0)
    assert (fitted <= fit_modal_filters(taps, 4)[3] + 1e-6).all()
    assert fitted.mean() < 0.97 * fit_modal_filters(taps, 4)[3].mean()


def test_poles_lie_inside_the_unit_circle_and_residues_stay_small():
    """Residues stay small: large ones that cancel would lose float32's digits."""
    taps = implicit(4, 300)
    log_decay, _, residues, _ = fit_modal_filters(taps, 12)
    assert (torch.exp(-log_decay.exp()) < 1).all()
    size = (residues.norm(dim=2) / (2 * log_decay.exp()).sqrt()).amax(1)  # norm of each mode's taps
    assert (size < 1e5 * taps.norm(dim=1)).all()


def test_odd_filters():
    """Zero, one tap, constant, alternating, a late step, tiny, huge: results are finite and errors true."""
    t = torch.arange(100.0)
    taps = torch.stack(
        [0 * t, (t == 0).float(), 0 * t + 1, (-1.0) ** t, (t > 50).float(), 1e-20 * 0.9**t, 1e20 * 0.8**t]
    )
    *parameters, error = fit_modal_filters(taps, 3)
    assert all(p.isfinite().all() for p in parameters)
    assert error[0] == 0
    assert (error[[1, 2, 3, 5, 6]] < 1e-2).all(), error
    torch.testing.assert_close(error[1:], true_error(taps[1:], *(p[1:] for p in parameters)), rtol=1e-3, atol=1e-6)


def test_channels_do_not_see_each_other(monkeypatch):
    taps = implicit(3, 100)
    whole = fit_modal_filters(taps, 4)
    monkeypatch.setattr(modal_fitting, "CHUNK_ELEMENTS", 1)
    for a, b in zip(whole, fit_modal_filters(taps, 4)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [2, 3, 10])
def test_short_filters(length):
    taps = torch.randn(3, length)
    assert (fit_modal_filters(taps, 8)[3] < 0.05).all()


@pytest.mark.parametrize(
    ("taps", "modes", "named"),
    [
        (torch.zeros(5), 4, "channels, length"),
        (torch.zeros(5, 1), 4, "channels, length"),
        (torch.zeros(5, 9), 0, "modes"),
        (torch.full((5, 9), torch.nan), 4, "finite"),
    ],
)
def test_errors_name_the_argument(taps, modes, named):
    with pytest.raises(ValueError, match=named):
        fit_modal_filters(taps, modes)
