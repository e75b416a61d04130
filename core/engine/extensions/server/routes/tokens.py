"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from fastapi import APIRouter, Request

from engine.extensions.server import context
from engine.extensions.server.errors import APIError
from engine.extensions.server.protocol import DetokenizeRequest, TokenizeRequest
from engine.extensions.server.streams import JSON

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> JSON:
    """Token ids of a prompt, or of a conversation as the model would see it."""
    service = context.service(request)
    body.check_unknown(service.args.allow_unknown_fields)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "give either prompt or messages", "prompt")
    if body.messages is not None:
        prompt, _ = await context.chat(request).prompt(service, body.conversation())
        ids = prompt["prompt_token_ids"]
    else:
        ids = await service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    tokenizer = service.llm.get_tokenizer()
    strings = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return JSON(
        {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": service.llm.info.max_model_len,
            "token_strs": strings,
        }
    )


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> JSON:
    """The text of token ids, special tokens included."""
    service = context.service(request)
    body.check_unknown(service.args.allow_unknown_fields)
    service.check_model(body.model)
    size = service.llm.info.vocab_size
    if wrong := [i for i in body.tokens if i >= size]:
        raise APIError(400, f"token id {wrong[0]} is out of the model's vocabulary of {size}", "tokens")
    tokenizer = service.llm.get_tokenizer()
    text = await service.offload(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
    return JSON({"prompt": text})
