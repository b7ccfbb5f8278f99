"""What a Markdown page looks like to a reader, whatever stands in it."""

from collections import Counter

from markdown_it import MarkdownIt

# Ends spans, blocks, tables and the page's head; tags, links, pictures, formulas, commands for a terminal
HOSTILE = (
    "a`b</code>``\n```\n````\n---\n\n<script>alert(1)</script>\n# title\n[x](javascript:alert) ![x](//evil/x.png) "
    "<https://evil> https://evil *x* ~~x~~ | x | $x$ @all \x1b[31m \N{RIGHT-TO-LEFT OVERRIDE}"
)


def structure(page: str) -> Counter[str]:
    """How many titles, links, tables, pieces of HTML ... there are below the head."""
    body = page.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    return Counter(token.type for token in [*tokens, *inline] if token.type != "text")


def replaced(content: object, text: str) -> object:
    """A tree of lists and dictionaries with a text in place of each text."""
    if isinstance(content, dict):
        return {key: replaced(value, text) for key, value in content.items()}
    if isinstance(content, list):
        return [replaced(value, text) for value in content]
    return text if isinstance(content, str) else content
