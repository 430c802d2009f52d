"""Which documents are worth having, by themselves: how long they are and in what language.

Imported in worker processes, like the language model behind it, and only where it is asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from gptscale.config.schema import FilterConfig
from gptscale.runtime.errors import UserError

_JUDGED_CHARACTERS = 2000
"""A document's language is judged by its beginning: enough to be sure, and a long one costs no more."""


def refused(text: str, filters: FilterConfig) -> str | None:
    """Why a document is left out, as the manifest calls it; None where it is kept."""
    if len(text) < filters.min_characters:
        return "too_short"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "too_long"
    if filters.languages and language(text) not in filters.languages:
        return "language"
    return None


def language(text: str) -> str:
    """ISO 639 code of a text's most likely language (Lui and Baldwin, "langid.py", ACL 2012)."""
    code: str = _identifier().classify(text[:_JUDGED_CHARACTERS])[0]
    return code


def check_filters(filters: FilterConfig) -> None:
    """Raises UserError for settings that can mean nothing."""
    if filters.min_characters < 0 or (filters.max_characters or filters.min_characters) < filters.min_characters:
        raise UserError(
            f"data.filters: min_characters={filters.min_characters} and max_characters={filters.max_characters} "
            "leave no document\nset 0 <= min_characters <= max_characters"
        )
    if filters.near_duplicates is not None and not 0.3 <= filters.near_duplicates <= 0.95:
        raise UserError(
            f"data.filters.near_duplicates={filters.near_duplicates} is no similarity that can be told\n"
            "set it between 0.3 and 0.95, e.g. 0.7, or null; for equal texts there is data.filters.exact_duplicates"
        )
    if filters.languages:
        known = sorted(_identifier().labels)
        for code in filters.languages:
            if code not in known:
                raise UserError(
                    f"data.filters.languages: {code!r} is not a language that can be told\n"
                    f"name ISO 639 codes, of {', '.join(known)}"
                )


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
