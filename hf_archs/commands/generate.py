"""``hf-archs generate``: a text continued, and the sampling options that ``chat`` shares."""

from typing import Any

import torch
from transformers import TextStreamer, set_seed

from hf_archs.commands.loading import load_ready
from hf_archs.data import text


def sampling(temperature: float, top_k: int) -> dict[str, Any]:
    """The arguments of `generate` for a temperature, of which 0 always takes the most likely token."""
    return {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}


def continue_text(
    model: str, prompt: str, adapter: str | None, tokenizer: str | None, seed: int, **options: Any
) -> None:
    """Print the continuation of a prompt while it is generated.

    Args:
        model, adapter, tokenizer: as for `load_ready`.
        options: further arguments of `generate`.
    """
    loaded, encoder = load_ready(model, adapter, tokenizer)
    set_seed(seed)
    loaded.generate(
        torch.tensor([[text.start_token(encoder), *text.encode(encoder, prompt)]], device=loaded.device),
        pad_token_id=encoder.pad_token_id,
        streamer=TextStreamer(encoder, skip_special_tokens=True),
        **options,
    )
