"""The file `tokenizer.model` of a SentencePiece BPE, made of `tokenizer.json`, which is all that transformers saves.

llama.cpp's conversion reads vocabularies of this kind (Gemma's, the first Llamas') from there alone.
"""

import json
from pathlib import Path
from typing import Any


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer, as tokenizer.json describes it, is a BPE over letters that falls back to bytes."""
    return tokenizer["model"]["type"] == "BPE" and bool(tokenizer["model"].get("byte_fallback"))


def write_sentencepiece_model(folder: Path) -> None:
    """Write it beside the tokenizer.json of a folder, and the kinds of added tokens into tokenizer_config.json, where
    the conversion looks for them. ValueError where sentencepiece is not installed."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as protocol
    except ImportError as error:
        raise ValueError(f"This tokenizer needs sentencepiece ({error}): pip install 'vora-vlm[llamacpp]'.") from None
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    described, kinds = tokenizer["model"], protocol.ModelProto.SentencePiece
    pieces = {id: (piece, kinds.NORMAL) for piece, id in described["vocab"].items()}
    bytes_of = {f"<0x{byte:02X}>" for byte in range(256)}
    pieces |= {id: (piece, kinds.BYTE) for id, (piece, _) in pieces.items() if piece in bytes_of}
    for added in tokenizer["added_tokens"]:
        pieces[added["id"]] = added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    unknown = described.get("unk_token") or "<unk>"
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in described["merges"]]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)  # what is merged first scores highest
    model = protocol.ModelProto()
    for id in range(max(pieces) + 1):
        piece, kind = pieces.get(id, (f"<unused-{id}>", kinds.UNUSED))
        kind = kinds.UNKNOWN if piece == unknown else kind
        model.pieces.add(piece=piece, score=-float(ranks.get(piece, len(merges))), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.trainer_spec.vocab_size, model.trainer_spec.unk_piece = len(model.pieces), unknown
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    model.normalizer_spec.add_dummy_prefix = _begins_with_space(tokenizer)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(added["id"]): added for added in tokenizer["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _begins_with_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before the first word of a text."""
    steps = [tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}]
    steps += [step for one in steps for step in one.get("normalizers", one.get("pretokenizers", []))]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)
