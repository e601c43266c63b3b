"""Checks whether a model directory can be trained and sampled from, without loading its weights.

The directory's files are foreign, so a child process with limits of time and memory reads them
(`models/checkpoints/bounded.py`). The child reads the headers of the weights, builds the
architecture without memory, compares the two by transformers' own rules, loads the tokenizer and
renders the chat template. A directory that passes is remembered for all experiments of the user.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from constitutions.errors import UserError
from models.checkpoints.architecture import (
    NAMED,
    Use,
    compare,
    first_line,
    no_chat_template,
    read_config,
)
from models.checkpoints.bounded import Step, ask, serve
from models.checkpoints.gguf import local_directory
from models.checkpoints.headers import (
    check_listing,
    digest_parts,
    read_object,
    read_tensors,
    shards_there,
)
from models.checkpoints.shapes import cached_config
from models.files import recall, remember, user_cache
from models.policy import FINGERPRINT, Messages, PolicySettings
from models.prompts import Examples, Templates, ask_refinement
from models.templates import templates_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MEDIA = re.compile("image|audio|video|vision", re.IGNORECASE)
LONGEST_TEXT = 1 << 20
"""Most characters that a template may write for a conversation of a few hundred characters."""


def check_directory(
    directory: Path,
    settings: PolicySettings,
    use: Use,
) -> str:
    """What a model directory holds, in a few words; this process loads none of its files.

    Args:
        settings: quantisation and chat template of the model.

    Raises:
        UserError: the model cannot serve its use, or the check exceeds its limits of time or
            memory.
    """
    check_listing(directory)
    keys = [_key(directory, settings, asked) for asked in dict.fromkeys((use, "trained"))]
    keys = keys if use == "sampled" else keys[:1]  # what can be trained can be sampled from
    for key in keys:
        if known := recall(_passed(), key):
            return known
    request = {
        "directory": str(directory.resolve()),
        "settings": settings.model_dump(mode="json"),
        "use": use,
    }
    ended = ask("models.checkpoints.check", request)
    if ended.reason:
        raise UserError(f"{ended.step} {ended.reason}", where=f"model directory {directory}")
    if ended.error:
        raise _moved(ended.error, directory)
    found = str(ended.answer["found"])
    remember(_passed(), keys[0], found)
    return found


def _passed() -> Path:
    """The folder with a file for each directory that has passed: a key says all that matters."""
    return user_cache() / "checked"


MODELS = Path(__file__).parents[1]
SOURCES = (
    *sorted((MODELS / "checkpoints").glob("*.py")),
    MODELS / "training/encoding.py",
    *(MODELS / f"{name}.py" for name in ("chat", "chat_template", "thoughts", "prompts")),
)
"""The modules that decide what passes: when one changes, directories are checked again."""


def _key(directory: Path, settings: PolicySettings, use: Use) -> str:
    """sha256 (hex) of everything on which a check depends."""
    facts = settings.model_dump(mode="json", context=FINGERPRINT)
    facts |= {"model": "", "use": use, "transformers": version("transformers")}
    facts["templates"] = _turns(settings).texts
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    for part in digest_parts(directory):
        digest.update(part)
    return digest.hexdigest()


def _turns(settings: PolicySettings) -> Templates:
    """The turns that a chat template is tried on; examples would only add more of the same."""
    return replace(templates_of(settings.templates), examples=Examples())


def _moved(error: UserError, directory: Path) -> UserError:
    """The child's error with the directory's path as the user gave it, not as it was resolved."""
    real = str(directory.resolve())
    where = error.where.replace(real, str(directory)) or f"model directory {directory}"
    what = error.what.replace(real, str(directory))
    return UserError(what, where=where, expected=error.expected, fix=error.fix)


def located(settings: PolicySettings) -> Path | None:
    """The model's directory, or that of a hub model which is complete in the cache; else None.

    Raises:
        UserError: a GGUF file cannot be dequantised.
    """
    if directory := local_directory(settings.model):
        return directory
    config = cached_config(settings)
    if config is None:
        return None
    try:
        check_listing(config.parent)
        return config.parent if shards_there(config.parent) else None
    except UserError:
        return None


# In the child --------------------------------------------------------------------------------


def main() -> None:
    """Answer one request of `check_directory`, in the child."""

    def work(request: Any, step: Step) -> dict[str, str]:
        settings = PolicySettings.model_validate(request["settings"])
        return {"found": examine(Path(request["directory"]), settings, request["use"], step)}

    serve(work)


def examine(
    directory: Path,
    settings: PolicySettings,
    use: Use = "trained",
    step: Step = lambda name, seconds, memory=0: None,
) -> str:
    """What `check_directory` returns, found in this process without limits or memory.

    Raises:
        UserError: the first fault that is found.
    """
    step("reading the headers of the weights", 10)
    held = read_tensors(directory)
    read_object(directory / "config.json")
    step("importing transformers", 60)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    step("reading config.json", 15)
    config = read_config(directory, settings, use)
    step("building what config.json describes", 15)
    name, parameters, rows = compare(config, held, use)
    step("loading the tokenizer", 15)
    tokenizer = _tokenizer(directory)
    _check_ids(directory, tokenizer, config, rows)
    step("rendering the chat template", 8)
    ends = _check_chat(directory, tokenizer, settings, use, rows)
    return f"{name}, {parameters:,} parameters{ends}"


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
        raise no_chat_template(f"model directory {directory}")
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_ids(
    directory: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, rows: int
) -> None:
    """Raise UserError where a token that a text can have has no row in the embedding.

    A placeholder for images or sound, which text models keep from a multimodal family (Gemma 3),
    needs no row: it is special, and no template writes it for a text.
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
    configs: dict[str, Any] = {"config.json": config}
    if (directory / "generation_config.json").exists():
        configs["generation_config.json"] = _generation(directory)
    for file, holder in configs.items():
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
    """Check that the chat template renders the project's conversations and ends turns.

    Returns:
        The end of a turn, in words, for a model that is trained; otherwise "".

    Raises:
        UserError: the template refuses, drops or inflates a conversation, or ends no turn.
    """
    from models.chat import Chat
    from models.chat_template import ChatError
    from models.training.encoding import EncodingError, check_template

    where = f"model directory {directory}"
    chat, wording = Chat(tokenizer, settings), _turns(settings)
    turns: Messages = (
        {"role": "system", "content": "Answer in plain words."},
        {"role": "user", "content": "Do you have an oven?"},
    )
    asked = ask_refinement(wording, turns, "Mix flour with water.", "Name every quantity.")
    for conversation in (turns[:1], turns[1:], turns, asked[1:], asked):
        if (length := len(chat.rendered(conversation))) > LONGEST_TEXT:
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


if __name__ == "__main__":
    main()
