"""Packing: documents in one row have the results that each has alone, with each of a collator's three signals."""

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_archs.testing.contract.models import (
    TOLERANCE,
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
from hf_archs.testing.contract.padding import KINDS, padded

SIGNALS = {
    "position_ids": ("position_ids",),
    "seq_idx": ("seq_idx",),
    "cu_seq_lens": ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
# documents of one token, at the start and inside; documents across the ends of chunks at 64 and 128, and ending there
LENGTHS = (1, 5, 70, 1, 51, 12)


def documents(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Token ids of documents of these lengths, each ``(length,)``."""
    return [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]


def collated(rows: list[torch.Tensor], signal: str) -> dict[str, Any]:
    """One packed row from transformers' collator: ``input_ids``, ``labels`` and only this signal."""
    collator = DataCollatorWithFlattening(return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    missing = set(SIGNALS[signal]) - batch.keys()
    assert not missing, f"the collator gives no {missing}"
    return {name: batch[name] for name in ("input_ids", "labels", *SIGNALS[signal])}


class PackingContract(Contract):
    """Promises about packed rows."""

    @pytest.mark.parametrize("signal", SIGNALS)
    def test_forward_gradients_and_loss(self, model: Any, signal: str) -> None:
        rows = documents(LENGTHS)
        batch = collated(rows, signal)
        # the routers' loss is of a whole batch, and not a mean over documents
        options = {"output_router_logits": False} if model.model.has_routers else {}
        out = model(**batch, **options)
        alone = [model(row[None]).logits[0] for row in rows]
        for i, (found, expected) in enumerate(zip(out.logits[0].split(LENGTHS), alone)):
            assert_close(found, expected, f"document {i}")
        predicted = sum(n - 1 for n in LENGTHS)
        pairs = [(row[None], n - 1) for row, n in zip(rows, LENGTHS) if n > 1]
        losses = [forward(model, row, labels=row, **options).loss * n for row, n in pairs]
        assert abs(out.loss.item() - sum(losses).item() / predicted) < TOLERANCE * out.loss.item()

        # gradients in float64, since large random weights amplify float32's rounding errors
        model.double()
        packed = model(**batch).logits[0].split(LENGTHS)
        found = gradients(model, total(weighed(part, i) for i, part in enumerate(packed)))
        apart = (model(row[None]).logits[0] for row in rows)
        assert_all_close(found, gradients(model, total(weighed(p, i) for i, p in enumerate(apart))), "gradient", 1e-9)

    @pytest.mark.parametrize("signal", SIGNALS)
    def test_the_cache_holds_the_last_document(self, model: Any, signal: str) -> None:
        rows = documents((7, 2, 6))
        batch = collated(rows, signal)
        del batch["labels"]
        cache = forward(model, **batch, use_cache=True).past_key_values
        more = tokens(1, 5, seed=9)
        found = logits(model, more, past_key_values=cache)
        assert_close(found, logits(model, torch.cat([rows[-1][None], more], 1))[:, 6:], "continued")

    def test_a_short_last_document(self, model: Any) -> None:
        """The last document is shorter than a convolution's window, which must not reach into the document before."""
        rows = documents((9, 1))
        batch = collated(rows, "seq_idx")
        cache = forward(model, batch["input_ids"], seq_idx=batch["seq_idx"], use_cache=True).past_key_values
        more = tokens(1, 5, seed=9)
        found = logits(model, more, past_key_values=cache)
        assert_close(found, logits(model, torch.cat([rows[-1][None], more], 1))[:, 1:], "continued")

    @pytest.mark.parametrize("signal", ["position_ids", "seq_idx"])
    def test_rows_that_are_cut_differently(self, model: Any, signal: str) -> None:
        cuts = ((8, 12), (3, 3, 14))
        rows = [documents(cut) for cut in cuts]
        batches = [collated(row, signal) for row in rows]
        ids, marks = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", signal))
        found = logits(model, ids, **{signal: marks})
        for i, (cut, row) in enumerate(zip(cuts, rows)):
            for j, (part, document) in enumerate(zip(found[i].split(cut), row)):
                assert_close(part, logits(model, document[None])[0], f"row {i}, document {j}")

    def test_one_row_of_positions_for_a_batch(self, model: Any) -> None:
        rows = documents((8, 12))
        positions = collated(rows, "position_ids")["position_ids"]
        ids = tokens(3, 20)
        found = logits(model, ids, position_ids=positions)
        assert_close(found[:, 8:], logits(model, ids[:, 8:]), "second documents")

    def test_packed_and_padded(self, model: Any) -> None:
        """``seq_idx`` separates documents in a row whose mask has pads anywhere."""
        rows = documents((6, 9))
        ids, mask = padded([torch.cat(rows)], "interior", 20)
        real = mask[0].bool()
        seq_idx = torch.zeros(1, 20, dtype=torch.int32)
        seq_idx[0, real] = torch.tensor([0] * 6 + [1] * 9, dtype=torch.int32)
        found = logits(model, ids, attention_mask=mask, seq_idx=seq_idx)[0, real]
        for i, (part, document) in enumerate(zip(found.split((6, 9)), rows)):
            assert_close(part, logits(model, document[None])[0], f"document {i}")

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_mask_outranks_positions(self, model: Any, kind: str) -> None:
        """Beside a mask, positions do not mark documents: `generate` passes both, and its positions restart at pads."""
        ids, mask = padded([tokens(1, 9)[0], tokens(1, 14)[0]], kind, 16)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        expected = logits(model, ids, attention_mask=mask)
        assert torch.equal(logits(model, ids, attention_mask=mask, position_ids=positions), expected)

    def test_positions_of_a_continuation(self, model: Any) -> None:
        """Beside a cache that holds tokens, positions do not mark documents."""
        ids = tokens(1, 14)
        expected = logits(model, ids)
        for positions in (torch.arange(6, 14)[None], torch.tensor([[6, 7, 8, 0, 1, 2, 3, 4]])):
            cache = forward(model, ids[:, :6], use_cache=True).past_key_values
            found = logits(model, ids[:, 6:], past_key_values=cache, position_ids=positions)
            assert_close(found, expected[:, 6:], f"positions {positions.tolist()}")

    def test_signals_that_do_not_fit(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"seq_idx has shape \(1, 4\); allowed is \(1, 6\)"):
            model(tokens(1, 6), seq_idx=torch.zeros(1, 4, dtype=torch.int32))
        with pytest.raises(ValueError, match="cu_seq_lens"):
            model(tokens(2, 6), cu_seq_lens_q=torch.tensor([0, 3, 6], dtype=torch.int32))
