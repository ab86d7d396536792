"""``hf-archs serve``: transformers' own server, ``transformers serve``, for a model of this library.

Its handlers and routes are used as they are, and it answers requests one after the other with `generate`. Two things
are ours: the model is loaded as by the other commands, and a prompt starts from the states of a prefix cache.
"""

import asyncio
import socket
from typing import Any

import torch
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import GenerateManager, GenerationState

from hf_archs.cache import StateCache
from hf_archs.commands.loading import load_ready
from hf_archs.errors import needs

PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")  # of `transformers[serving]`


def serve(name: str, adapter: str | None, tokenizer: str | None, host: str, port: int, max_bytes: int) -> None:
    """Serve a model until Ctrl-C.

    Args:
        name: folder or Hub repository, by which clients ask for the model.
        adapter, tokenizer: as for `load_ready`.
        max_bytes: as for `StateCache`.

    Raises:
        ImportError: if a package of the server is missing.
        OSError: if nothing can listen at the address; the model is not loaded then.
    """
    for package in PACKAGES:
        needs(package, "hf-archs serve", "serve")
    import uvicorn

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(
            f"the server cannot listen at {host} on port {port} ({error.strerror}); choose others with --host, --port"
        ) from error
    model, encoder = load_ready(name, adapter, tokenizer)
    if not encoder.chat_template:
        print(f"{name!r} has no chat template: /v1/completions is answered, and /v1/chat/completions fails")
    print(f"{name!r} at http://{host}:{port}/v1")
    config = uvicorn.Config(application(name, model, encoder, max_bytes), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


def application(name: str, model: Any, tokenizer: Any, max_bytes: int) -> Any:
    """The ASGI application of transformers' server for one loaded model.

    Args:
        name: the model's name for clients.
        max_bytes: as for `StateCache`.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    models, generation = _Models(name, model, tokenizer), _Generation(StateCache(model, max_bytes))
    return build_server(
        models,
        ChatCompletionHandler(models, generation),
        completion_handler=CompletionHandler(models, generation),
        response_handler=ResponseHandler(models, generation),
        transcription_handler=TranscriptionHandler(models, generation),
        systemone_handler=SystemOneHandler(models, generation),
        generation_state=generation,
    )


class _Models(ModelManager):
    """The one model of the server, which stays in memory when it is 'reset'."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(
        self, model_id_and_revision: str, *arguments: Any, gguf_file: str | None = None, **options: Any
    ) -> Any:
        """The model and its tokenizer. Raises `ValueError` for another name."""
        if model_id_and_revision != self.process_model_name(self.name) or gguf_file is not None:
            raise ValueError(f"the model is {model_id_and_revision!r}; allowed is {self.name!r}")
        if model_id_and_revision not in self.loaded_models:
            self.loaded_models[model_id_and_revision] = TimedModel(
                self.model, -1, self.tokenizer, on_unload=self.loaded_models.clear
            )
        return super().load_model_and_processor(model_id_and_revision, *arguments, **options)


class _Generation(GenerationState):
    """Generation without continuous batching, whose paged attention knows no recurrent layers."""

    def __init__(self, states: StateCache):
        super().__init__()
        self.manager = _Manager(states)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        """The one manager."""
        return self.manager


class _Manager(GenerateManager):
    """transformers' thread of `generate`, with a prefix cache."""

    def __init__(self, states: StateCache):
        super().__init__()
        self.states = states

    def generate_streaming(self, model: Any, *arguments: Any, **options: Any) -> tuple[asyncio.Queue, Any]:
        """As the base does, from a kept state."""
        from_states: Any = _WithStates(model, self.states)
        return super().generate_streaming(from_states, *arguments, **options)

    async def generate_non_streaming(self, model: Any, *arguments: Any, **options: Any) -> tuple[str, int, Any]:
        """As the base does, from a kept state."""
        from_states: Any = _WithStates(model, self.states)
        return await super().generate_non_streaming(from_states, *arguments, **options)


class _WithStates:
    """A model whose `generate` starts from the longest prefix that is kept, and keeps the state after the answer."""

    def __init__(self, model: Any, states: StateCache):
        self.model, self.states = model, states

    def generate(self, *, input_ids: torch.Tensor, generation_config: Any, **options: Any) -> torch.Tensor:
        """The tokens of the model's `generate`; several sequences, and other caches, are left to it alone."""
        options.update(input_ids=input_ids, generation_config=generation_config)
        several = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) > 1
        if several or generation_config.cache_implementation or generation_config.use_cache is False:
            return self.model.generate(**options)
        cache = self.states.read(input_ids)
        found = self.model.generate(past_key_values=cache, **options)
        self.states.keep(found[:, : cache.get_seq_length()], cache)
        return found
