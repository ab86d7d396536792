"""Padding: left, right and interior pads change neither the logits of real tokens nor the cache."""

from typing import Any

import pytest
import torch

from hf_archs.testing.contract.models import (
    Contract,
    assert_all_close,
    assert_close,
    forward,
    gradients,
    logits,
    tokens,
    total,
    weighed,
)

KINDS = ("left", "right", "interior")


def mask_of(kind: str, real: int, length: int) -> torch.Tensor:
    """A mask ``(length,)`` with ``real`` ones. ``kind`` says where the zeros are: left, right or interior."""
    mask = torch.ones(length, dtype=torch.long)
    pads = length - real
    if kind == "left":
        mask[:pads] = 0
    elif kind == "right":
        mask[real:] = 0
    else:  # two gaps (one for a single pad), with real tokens before, between and after
        first = pads // 2
        mask[2 : 2 + first] = 0
        mask[first + 3 : first + 3 + pads - first] = 0
    return mask


def padded(rows: list[torch.Tensor], kind: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch ``(rows, length)`` and its mask. Pads are arbitrary tokens, so that a test sees any effect of theirs."""
    ids = tokens(len(rows), length, seed=99)
    mask = torch.stack([mask_of(kind, row.numel(), length) for row in rows])
    for row, target, real in zip(rows, ids, mask):
        target[real.bool()] = row
    return ids, mask


class PaddingContract(Contract):
    """Promises about padded batches."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("lengths", [(12,), (19, 7, 12), (150, 65)], ids=str)
    def test_pads_change_nothing(self, model: Any, kind: str, lengths: tuple[int, ...]) -> None:
        """Logits, hidden states and cache equal those without pads, and so do logits that continue the cache, by one
        token and by several."""
        rows = [tokens(1, n, seed=n)[0] for n in lengths]
        more = tokens(len(rows), 6, seed=5)
        ids, mask = padded(rows, kind, max(lengths) + 5)
        out = forward(model, ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
        cache = out.past_key_values
        states = {name: tensor.clone() for name, tensor in cache.tensors()}
        longer = torch.cat([mask, torch.ones(len(rows), 6, dtype=torch.long)], 1)
        step = logits(model, more[:, :1], attention_mask=longer[:, :-5], past_key_values=cache)
        rest = logits(model, more[:, 1:], attention_mask=longer, past_key_values=cache)
        for i, row in enumerate(rows):
            real = mask[i].bool()
            alone = forward(model, row[None], use_cache=True, output_hidden_states=True)
            whole = logits(model, torch.cat([row, more[i]])[None])[0]
            assert_close(out.logits[i, real], alone.logits[0], f"row {i}")
            for layer, (found, expected) in enumerate(zip(out.hidden_states, alone.hidden_states)):
                assert_close(found[i, real], expected[0], f"row {i}, hidden states {layer}")
            expected = {name: tensor[0] for name, tensor in alone.past_key_values.tensors()}
            found = {name: tensor[i] for name, tensor in states.items()}
            for name, tensor in found.items():
                # a state that grows with the length starts with a column of zeros per pad, wherever the pads were
                pads = tensor.shape[-1] - expected[name].shape[-1]
                assert not tensor[..., :pads].any(), f"row {i}, {name}: the column of a pad is not zero"
                found[name] = tensor[..., pads:]
            assert_all_close(found, expected, f"row {i}, cache")
            assert_close(torch.cat([step[i], rest[i]]), whole[row.numel() :], f"row {i}, continued")

    @pytest.mark.parametrize("kind", KINDS)
    def test_pads_in_a_continuation(self, model: Any, kind: str) -> None:
        """A padded call continues a padded call; one of its rows has no real token."""
        first, second = [tokens(1, n, seed=n)[0] for n in (9, 5, 7)], [tokens(1, n, seed=n)[0] for n in (4, 8, 0)]
        ids, mask = padded(first, kind, 10)
        cache = forward(model, ids, attention_mask=mask, use_cache=True).past_key_values
        more, more_mask = padded(second, "right" if kind == "left" else "left", 8)
        found = logits(model, more, attention_mask=torch.cat([mask, more_mask], 1), past_key_values=cache)
        last = tokens(3, 2, seed=8)
        end = logits(model, last, past_key_values=cache, attention_mask=torch.ones(3, 20, dtype=torch.long))
        for i, (a, b) in enumerate(zip(first, second)):
            whole = logits(model, torch.cat([a, b, last[i]])[None])[0]
            if b.numel():
                assert_close(found[i, more_mask[i].bool()], whole[a.numel() : -2], f"row {i}")
            assert_close(end[i], whole[-2:], f"row {i}, the end")

    def test_prefill_in_chunks_that_are_all_pads(self, model: Any) -> None:
        """A left-padded batch in chunks, as with `prefill_chunk_size`: the short row's first chunks are only pads."""
        rows = [tokens(1, n, seed=n)[0] for n in (17, 3)]
        ids, mask = padded(rows, "left", 17)
        cache, found = None, []
        for start in range(0, 17, 5):
            piece, seen = ids[:, start : start + 5], mask[:, : start + 5]
            out = forward(model, piece, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        for i, row in enumerate(rows):
            assert_close(torch.cat(found, 1)[i, -row.numel() :], logits(model, row[None])[0], f"row {i}")

    def test_forms_of_the_mask(self, model: Any) -> None:
        """Masks of booleans, floats and integers give equal logits; of a longer mask, only the last columns count."""
        ids, mask = padded([tokens(1, 6)[0], tokens(1, 9)[0]], "interior", 12)
        expected = logits(model, ids, attention_mask=mask)
        for form in (mask.bool(), mask.float(), torch.cat([1 - mask, mask], 1)):
            assert torch.equal(logits(model, ids, attention_mask=form), expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_come_from_real_tokens_alone(self, model: Any, kind: str) -> None:
        """Gradients equal those without pads; in float64, since large random weights amplify rounding errors."""
        model.double()
        rows = [tokens(1, n, seed=n)[0] for n in (14, 6)]
        ids, mask = padded(rows, kind, 18)
        out = model(ids, attention_mask=mask).logits
        found = gradients(model, total(weighed(out[i, real.bool()], i) for i, real in enumerate(mask)))
        alone = gradients(model, total(weighed(model(row[None]).logits[0], i) for i, row in enumerate(rows)))
        assert_all_close(found, alone, "gradient", 1e-9)
