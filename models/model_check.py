"""Whether a model directory can be sampled from and trained exactly, told without loading it.

`check_directory` asks a child process with bounds of time and memory (`models/bounded.py`), because
all that is in the directory was written by others: the child reads the headers of the weights,
builds the architecture without memory for it, compares the two by transformers' own rules, loads
the tokenizer and renders the chat template. What was found good is remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from constitutions.errors import UserError
from models.bounded import DATA_BYTES, Step, ask, serve
from models.checkpoint import (
    Tensor,
    check_listing,
    digest_parts,
    read_object,
    read_tensors,
    shards_there,
)
from models.policy import FINGERPRINT, Messages, PolicySettings
from models.prompts import TEMPLATES, ask_refinement
from models.shapes import cached_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from models.chat import Chat

Use = Literal["trained", "sampled", "reward"]
"""What is done with a model: sampled from and trained, only sampled from, or asked for rewards."""

HARMLESS = re.compile(
    r"inv_freq$|masked_bias$|\.attn(\.attention)?\.bias$|attention\.bias$|position_ids$"
    r"|_extra_state$|(^|\.)(mtp|nextn|vision\w*|visual|audio\w*|multi_modal\w*|mm_\w+|embed_vision)\."
)
"""Tensors that checkpoints carry and no causal language model computes with: buffers that are
derived anew, heads that predict further tokens, towers for images and sound."""
OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+$")
"""Names of architectures that were trained to do something else than to go on with a text."""
MEDIA = re.compile("image|audio|video|vision", re.IGNORECASE)
LARGEST_BUFFERS = 1 << 30
"""Bytes of tables that an architecture computes for itself (positions, masks)."""
LONGEST_TEXT = 1 << 20
"""Characters that a template may write around a conversation of a few hundred."""
CHECKED = "checked"
"""Folder below the home: what was found of model directories, a file each."""
NAMED = 4
"""How many of several faulty names a message tells."""


def check_directory(
    directory: Path,
    settings: PolicySettings,
    use: Use = "trained",
    home: Path | None = None,
    *,
    data_bytes: int = DATA_BYTES,
) -> str:
    """What a model directory holds, in a few words; nothing of it is loaded in this process.

    Args:
        settings: how the model will be held, and which chat template it is asked with.
        home: where it is remembered what was found good; None: in this process alone.
        data_bytes: memory of the child.

    Raises:
        UserError: it cannot be sampled from or trained exactly, or takes more time or memory to
            look at than any model does.
    """
    check_listing(directory)
    keys = [_key(directory, settings, asked) for asked in dict.fromkeys((use, "trained"))]
    keys = keys if use == "sampled" else keys[:1]  # what can be trained can be sampled from
    known = next(filter(None, (_recalled(key, home) for key in keys)), None)
    if known is None:
        request = {
            "directory": str(directory.resolve()),
            "settings": settings.model_dump(mode="json"),
            "use": use,
        }
        ended = ask("models.model_check", request, data_bytes=data_bytes)
        if ended.reason:
            raise UserError(f"{ended.step} {ended.reason}", where=f"model directory {directory}")
        if "error" in ended.answer:
            raise _moved(UserError(**ended.answer["error"]), directory)
        known = str(ended.answer["found"])
    _remember(keys[0], known, home)
    return known


SOURCES = ("model_check", "checkpoint", "bounded", "chat", "thoughts", "encoding", "prompts")
"""Modules that decide what is found good: another version looks again."""
_good: dict[str, str] = {}
"""What was found of directories in this process, by `_key`."""


def _recalled(key: str, home: Path | None) -> str | None:
    if key not in _good and home is not None:
        with suppress(OSError, UnicodeDecodeError):  # what cannot be read is found again
            _good[key] = (home / CHECKED / key).read_text("utf-8")
    return _good.get(key) or None


def _remember(key: str, found: str, home: Path | None) -> None:
    _good[key] = found
    if home is not None and not (home / CHECKED / key).exists():
        (home / CHECKED).mkdir(parents=True, exist_ok=True)
        scratch = home / CHECKED / f".{key}.{os.getpid()}.tmp"
        scratch.write_text(found, "utf-8")
        scratch.replace(home / CHECKED / key)


def _key(directory: Path, settings: PolicySettings, use: Use) -> str:
    """sha256 (hex) over everything that a check depends on."""
    told = settings.model_dump(mode="json", context=FINGERPRINT)
    told |= {"model": "", "use": use, "transformers": version("transformers")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for source in SOURCES:
        digest.update((Path(__file__).parent / f"{source}.py").read_bytes())
    for part in digest_parts(directory):
        digest.update(part)
    return digest.hexdigest()


def _moved(error: UserError, directory: Path) -> UserError:
    """The error of a child, which knows the directory by its resolved path."""
    real = str(directory.resolve())
    where = error.where.replace(real, str(directory)) or f"model directory {directory}"
    what = error.what.replace(real, str(directory))
    return UserError(what, where=where, expected=error.expected, fix=error.fix)


# In the child --------------------------------------------------------------------------------


def main() -> None:
    """Answer one request of `check_directory`."""

    def work(request: Any, step: Step) -> dict[str, Any]:
        settings = PolicySettings.model_validate(request["settings"])
        try:
            found = examine(Path(request["directory"]), settings, request["use"], step)
        except UserError as error:
            told = {part: getattr(error, part) for part in ("what", "where", "expected", "fix")}
            return {"error": told}
        return {"found": found}

    serve(work)


def examine(
    directory: Path,
    settings: PolicySettings,
    use: Use = "trained",
    step: Step = lambda name, seconds: None,
) -> str:
    """What `check_directory` tells, without its bounds.

    Raises:
        UserError: the first thing that is wrong.
    """
    step("reading the headers of the weights", 10)
    held = read_tensors(directory)
    read_object(directory / "config.json")
    step("importing transformers", 60)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    step("reading config.json", 5)
    config = read_config(directory, settings, use)
    step("building what config.json describes", 15)
    name, parameters, rows = compare(config, held, use)
    step("loading the tokenizer", 15)
    tokenizer = _tokenizer(directory)
    _check_ids(directory, tokenizer, config, rows)
    step("rendering the chat template", 8)
    ends = _check_chat(directory, tokenizer, settings, use, rows)
    return f"{name}, {parameters:,} parameters{ends}"


def read_config(directory: Path, settings: PolicySettings, use: Use) -> PreTrainedConfig:
    """The configuration, of an architecture that transformers has for this use.

    Raises:
        UserError: it has not, or the file names other weights, or holds no configuration.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    file = directory / "config.json"
    told = read_object(file)
    mapping = (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if use == "reward"
        else MODEL_FOR_CAUSAL_LM_MAPPING
    )
    if "transformers_weights" in told:
        raise UserError("names weights of its own (transformers_weights)", where=str(file))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        known = type(config) in mapping
    except Exception as error:  # of any kind: each architecture checks its configuration itself
        if "auto_map" in told:
            raise own_code(directory) from None
        raise UserError(
            f"holds no configuration that transformers knows: {first_line(error)}", where=str(file)
        ) from None
    other = [n for n in told.get("architectures") or () if OTHER_TASK.search(str(n))]
    if not known or (other and use != "reward"):
        if "auto_map" in told and not known:
            raise own_code(directory)
        raise UserError(
            f"describes {other[0] if other else f'a {config.model_type} model'}",
            where=str(file),
            expected="a sequence-classification model"
            if use == "reward"
            else "a causal language model of an architecture that transformers knows",
        )
    already = _quantised(config)
    if settings.quantization == "nf4" and already not in ("", "bitsandbytes"):
        raise UserError(
            f"the weights are quantised already ({already})",
            where=str(file),
            fix="set quantization to none, or take the version that is not quantised",
        )
    return cast("PreTrainedConfig", config)


def located(settings: PolicySettings) -> Path | None:
    """The model's files on this machine: a directory, or a hub's model that is whole in its cache.

    None: they are yet to be fetched, or made.
    """
    directory = Path(settings.model).expanduser()
    if directory.is_dir():
        return directory
    config = cached_config(settings)
    if config is None:
        return None
    try:
        check_listing(config.parent)
        return config.parent if shards_there(config.parent) else None
    except UserError:
        return None


def own_code(model: str | Path) -> UserError:
    """A model that asks to run code that it brings."""
    return UserError(
        "the model asks to run its own code (auto_map in config.json), which is refused",
        where=str(model),
        expected="a causal language model of an architecture that transformers knows",
        fix="serve it behind an OpenAI-compatible endpoint",
    )


def compare(config: PreTrainedConfig, held: Mapping[str, Tensor], use: Use) -> tuple[str, int, int]:
    """Hold the tensors of a checkpoint against the architecture of its configuration.

    Names and shapes go through the renaming, fusing and tying that `from_pretrained` applies:
    it loads them, on a device without memory.

    Returns:
        The architecture's name, its number of parameters and of rows in its embedding.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; or the configuration
            describes no model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if use == "reward" else AutoModelForCausalLM
    where = f"model directory {config.name_or_path}"
    quantised = _quantised(config)
    if quantised:
        del config.quantization_config
    try:
        with torch.device("meta"):
            shell = auto.from_config(config, trust_remote_code=False)
        tensors = {
            name: torch.empty(tensor.shape, dtype=_dtype(tensor.kind), device="meta")
            for name, tensor in held.items()
        }
        model, loading = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except MemoryError:
        raise
    except ImportError as error:
        raise UserError(
            f"needs a package that is not installed: {' '.join(str(error).split())[:300]}",
            where=where,
        ) from None
    except Exception as error:  # whatever an architecture makes of sizes that do not go together
        raise UserError(
            f"config.json describes no model that can be built: {first_line(error)}", where=where
        ) from None
    check_loading(loading, type(model).__name__, where, quantised=bool(quantised))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > LARGEST_BUFFERS:
        raise UserError(
            f"config.json asks for tables of {buffers >> 20:,} MiB beside the weights",
            where=where,
            expected=f"{LARGEST_BUFFERS >> 20:,} MiB at most",
        )
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0]) if hasattr(embedding, "weight") else 1 << 40
    return type(model).__name__, int(model.num_parameters()), rows


def check_loading(
    loading: Mapping[str, Any], name: str, where: str, *, quantised: bool = False
) -> None:
    """See that every tensor of a model came from its checkpoint, and none was left over.

    Args:
        loading: what `from_pretrained` tells with `output_loading_info`.
        name: of the architecture.
        quantised: the checkpoint holds weights in pieces; only those without any are missing.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    missing = set(loading["missing_keys"])
    unexpected = {key for key in loading["unexpected_keys"] if not HARMLESS.search(key)}
    wrong = {key: (there, here) for key, there, here in loading["mismatched_keys"]}
    if quantised:  # in pieces: codes, scales and zero points stand for a weight
        pieces = {key.rpartition(".")[0] for key in unexpected}
        pieces |= {re.sub("_(blocks|scales)$", "", key) for key in unexpected}
        missing = {k for k in missing if k not in pieces and k.rpartition(".")[0] not in pieces}
        unexpected, wrong = set(), {}
    shapes = [
        f"{key} is {_size(there)}, not {_size(here)}"
        for key, (there, here) in sorted(wrong.items())
    ]
    faults = [
        *(_listed("lack", missing) if missing else ()),
        *(_listed("have", unexpected, "that it does not know") if unexpected else ()),
        *([f"{len(wrong):,} of another shape ({'; '.join(shapes[:NAMED])})"] if wrong else ()),
        *[first_line(message) for message in loading.get("error_msgs") or ()][:NAMED],
        *[
            f"{key}: {first_line(message)}"
            for key, message in (loading.get("conversion_errors") or {}).items()
        ][:NAMED],
    ]
    if faults:
        raise UserError(
            f"the weights do not fit {name}: they {' and '.join(faults)}",
            where=where,
            expected="every tensor of the architecture that config.json describes, and no other: "
            "none is made up",
            fix="fetch the model again, or mend config.json",
        )


def _listed(verb: str, names: Iterable[str], why: str = "") -> list[str]:
    found = sorted(names)
    more = f", … and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    tail = f" {why}" if why else ""
    return [f"{verb} {len(found):,} tensors{tail} ({', '.join(found[:NAMED])}{more})"]


def _size(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"


def _quantised(config: PreTrainedConfig) -> str:
    """How a checkpoint's weights are quantised; empty where they are not."""
    told = getattr(config, "quantization_config", None) or {}
    found = told.get("quant_method") if isinstance(told, dict) else told.quant_method
    return str(getattr(found, "value", found) or "in a way of its own") if told else ""


def _dtype(kind: str) -> Any:
    import torch

    names = {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16},
        **{"BF16": torch.bfloat16, "C64": torch.complex64, "BOOL": torch.bool},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    }
    return names.get(kind, torch.uint8)


# Tokens and templates --------------------------------------------------------------------------


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(
            f"the tokenizer cannot be loaded: {first_line(error)}",
            where=f"model directory {directory}",
        ) from None
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            where=f"model directory {directory}",
            expected="a chat model (chat_template.jinja or a template in tokenizer_config.json)",
            fix="take the model's instruction-tuned version",
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_ids(
    directory: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, rows: int
) -> None:
    """Every token that a text can become has a row in the embedding.

    A placeholder for images or sound, as text models keep from a family that sees and hears
    (Gemma 3), needs none: it is special, and no template writes it for a text.
    """
    special = set(tokenizer.all_special_tokens) | {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    beyond = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and not (token in special and MEDIA.search(token))
    )
    if beyond:
        more = f", … and {len(beyond) - NAMED:,} more" if len(beyond) > NAMED else ""
        named = ", ".join(f"{token!r} ({number:,})" for number, token in beyond[:NAMED])
        raise UserError(
            f"the embedding has {rows:,} rows, and the tokenizer has tokens beyond them: "
            f"{named}{more}",
            where=f"model directory {directory}",
            fix="take the tokenizer that the model was trained with, or resize_token_embeddings",
        )
    said: dict[str, Any] = {"config.json": config}
    if (directory / "generation_config.json").exists():
        said["generation_config.json"] = _generation(directory)
    for file, holder in said.items():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = getattr(holder, name, None)
            for number in given if isinstance(given, list | tuple) else [given]:
                if not _is_row(number, rows) and not (name == "pad_token_id" and number == -1):
                    raise UserError(
                        f"{name} is {str(number)[:40]}",
                        where=str(directory / file),
                        expected=f"a row of the embedding: 0 to {rows - 1:,}",
                    )


def _is_row(number: Any, rows: int) -> bool:
    return number is None or (type(number) is int and 0 <= number < rows)


def _generation(directory: Path) -> Any:
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    read_object(file)
    try:
        return GenerationConfig.from_pretrained(directory)
    except Exception as error:  # it checks its own values
        raise UserError(
            f"holds no settings of generation: {first_line(error)}", where=str(file)
        ) from None


def _check_chat(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: PolicySettings,
    use: Use,
    rows: int,
) -> str:
    """The chat template takes the project's conversations, in a bounded text, and ends turns.

    What ends a turn is returned in words, for a model that is trained.
    """
    from models.chat import Chat, ChatError
    from models.encoding import EncodingError, check_template

    where = f"model directory {directory}"
    chat, wording = Chat(tokenizer, settings), TEMPLATES[settings.templates]
    turns: Messages = (
        {"role": "system", "content": "Answer in plain words."},
        {"role": "user", "content": "Do you have an oven?"},
    )
    asked = ask_refinement(wording, turns, "Mix flour with water.", "Name every quantity.")
    for conversation in (turns[:1], turns[1:], turns, asked[1:], asked):
        if (length := _length(chat, conversation)) > LONGEST_TEXT:
            raise UserError(
                f"the chat template writes {length:,} characters around a short conversation",
                where=where,
                expected=f"{LONGEST_TEXT:,} at most",
            )
    try:
        ids, ends = chat.conversation(asked, ask=True), ""
        if use == "trained":
            end = check_template(tokenizer, settings, wording).end_of_turn
            ids, ends = [*ids, *end], f", turns end with {tokenizer.decode(list(end))!r}"
    except (ChatError, EncodingError) as error:
        raise UserError(str(error)[:300], where=where) from None
    if max(ids, default=0) >= rows:
        raise UserError(
            f"the chat template writes {tokenizer.decode([max(ids)])!r}, which has no row in the "
            f"embedding ({rows:,} rows)",
            where=where,
        )
    return ends


def _length(chat: Chat, turns: Messages) -> int:
    """Characters of a rendered conversation; 0 where the template refuses it."""
    try:
        text = chat.tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", list(turns)),
            tokenize=False,
            chat_template=chat.template,
            **chat.arguments,
        )
    except MemoryError:
        raise
    except Exception:  # it is told where the conversation is needed
        return 0
    return len(cast(str, text))


def first_line(error: object) -> str:
    """What an error says, on one line of at most 300 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


if __name__ == "__main__":
    main()
