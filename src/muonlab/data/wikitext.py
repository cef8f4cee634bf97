"""A MediaWiki XML dump as plain prose: one document per article, markup and everything that is not running text dropped.

Made for enwik8 (the first 10^8 bytes of the English Wikipedia of March 2006, cut off in mid-article).
What goes: redirects, pages outside the article namespace, templates, tables, lists, headings, references, images,
the census paragraphs that one bot wrote about 30,000 American towns, and articles shorter than `MIN_ARTICLE`.
What stays: paragraphs of at least `MIN_PARAGRAPH` characters that end like a sentence, one per line.
"""

import re
from collections.abc import Iterable, Iterator
from html import unescape

CLEANER_VERSION = 1  # part of every cache key: raise it when the output changes
MIN_PARAGRAPH = 60  # characters
MIN_ARTICLE = 400  # characters

_TITLE = re.compile(r"<title>([^<]*)</title>")
_TEXT = re.compile(r"<text[^>]*>(.*)</text>", re.DOTALL)
_REDIRECT = re.compile(r"\s*#\s*redirect", re.IGNORECASE)
_NAMESPACES = (
    "Wikipedia:", "Template:", "Image:", "Category:", "Portal:", "Help:", "MediaWiki:", "User:", "Special:", "Talk:",
    "File:", "Media:",
)  # fmt: skip
_NOT_PROSE_TITLE = re.compile(r"(?:List of|Lists of|Table of|Timeline of)\b|.*\((?:disambiguation)\)$")

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_BLOCK = re.compile(
    r"<(ref|math|gallery|pre|nowiki|code|table|timeline|imagemap|center|blockquote|div)\b[^>]*(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>\n]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"^[ :]*\{\|(?:(?!\{\||^[ :]*\|\}).)*?^[ :]*\|\}", re.DOTALL | re.MULTILINE)
_NOT_PARAGRAPH = tuple("*#:;=|!{} \t<>-")  # first characters of lists, headings, table rows, preformatted text
_MEDIA = r"[Ii]mage|[Ff]ile|[Mm]edia|[Cc]ategory|[a-z]{2,3}(?:-[a-z]+)*|simple"  # also links to other languages
_LINK = re.compile(rf"\[\[:?(?!(?:{_MEDIA}):)(?:[^\[\]|\n]*\|)?([^\[\]|\n]*)\]\]")
_MEDIA_LINK = re.compile(rf"\[\[(?:{_MEDIA}):[^\[\]]*\]\]")
_EXTERNAL = re.compile(r"\[(?:https?|ftp|mailto):[^\s\]]*\s*([^\]\n]*)\]")
_QUOTES = re.compile(r"'{2,}")
_EMPTY_PARENTHESES = re.compile(r" ?\([\s,;:]*\)")
_AFTER_PARENTHESIS = re.compile(r"\([\s,;:]+")  # what a template that was dropped leaves: "(, born 1926)"
_SPACES = re.compile(r"[ \t\xa0]{2,}|\xa0")
_SPACE_BEFORE = re.compile(r" +([,.;:!?)])")
_RESIDUE = re.compile(r"\[\[|\]\]|\{\{|\}\}|\||https?:|__[A-Z]+__|[<>]")
_SENTENCE_END = (*".!?", '."', '!"', '?"', ".)", "!)", "?)", ".'", '".', "”", ".”")
_CENSUS_BOT = re.compile(
    r"As of the census|According to the (?:United States|U\.S\.) Census|The racial makeup of|There (?:are|were) [\d,.]+ households"
    r"|In the (?:city|town|village|county|township|CDP|borough|parish|census)[^.]{0,40} the population (?:is|was) spread out"
    r"|The median income for|The population density (?:is|was)|The median age (?:is|was)"
)


def articles(dump: Iterable[bytes]) -> Iterator[str]:
    """The prose of each article of `dump` (the lines of an XML dump), in the order of the dump."""
    page: list[bytes] = []
    for line in dump:
        if line.startswith(b"  <page>"):
            page = []
        elif line.startswith(b"  </page>"):
            text = article(b"".join(page).decode("utf-8", "replace"))
            if text:
                yield text
        else:
            page.append(line)


def article(page: str) -> str:
    """The prose of one `<page>` element, paragraphs joined by newlines; empty if too little is left."""
    title = _TITLE.search(page)
    text = _TEXT.search(page)
    if title is None or text is None:
        return ""
    name = unescape(title[1])
    if name.startswith(_NAMESPACES) or _NOT_PROSE_TITLE.match(name) or _REDIRECT.match(text[1]):
        return ""
    kept = "\n".join(paragraphs(unescape(text[1])))
    return kept if len(kept) >= MIN_ARTICLE else ""


def paragraphs(markup: str) -> list[str]:
    """The paragraphs of running text in wiki markup."""
    markup = _COMMENT.sub("", markup)
    markup = _BLOCK.sub("", markup)
    markup = _until_stable(_TEMPLATE, markup)
    if "{|" in markup:
        markup = _until_stable(_TABLE, markup)
    # Most lines of many articles are lists: dropping them before links are resolved halves the time.
    # Images may hold links and span lines, so an opening bracket is no reason to drop a line here.
    lines = [line for line in markup.split("\n") if len(line) >= MIN_PARAGRAPH and not line.startswith(_NOT_PARAGRAPH)]
    text = "\n".join(lines)
    text = _LINK.sub(r"\1", text)
    text = _MEDIA_LINK.sub("", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = unescape(text)  # a second level: the dump writes &amp;mdash; for what the author typed as &mdash;
    text = _EMPTY_PARENTHESES.sub("", text)
    text = _AFTER_PARENTHESIS.sub("(", text)
    text = _SPACES.sub(" ", text)
    text = _SPACE_BEFORE.sub(r"\1", text)
    return [line for line in map(str.strip, text.split("\n")) if _is_prose(line)]


def _is_prose(line: str) -> bool:
    return (
        len(line) >= MIN_PARAGRAPH
        and line.endswith(_SENTENCE_END)
        and not line.startswith(_NOT_PARAGRAPH)
        and not _RESIDUE.search(line)
        and not _CENSUS_BOT.match(line)
    )


def _until_stable(pattern: re.Pattern[str], text: str) -> str:
    """Removes innermost matches until none is left: the markup nests, regular expressions do not."""
    count = 1
    while count:
        text, count = pattern.subn("", text)
    return text
