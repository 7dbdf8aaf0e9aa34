"""
Our rules for prose, beside those of proselint: each with an example that breaks it.

A rule is a pattern within one sentence. ``CODE`` stands for code, or for a value in a message.
"""

import re
from typing import NamedTuple

LONGEST = 40  # words in a sentence

# A main clause has one of these, besides the one of its "what ...".
VERB = r"(?:is|are|was|were|has|have|had|can|may|must|will|do|does|did|\w+(?:s|ed))"

# Checks of proselint that fit technical prose. The others look for clichés and the like.
PROSELINT = {
    "archaism": True,
    "malapropisms": True,
    "misc.but": False,
    "mondegreens": True,
    "nonwords": True,
    "redundancy.ras_syndrome": True,
    "spelling": True,
    "uncomparables": False,
}


class Rule(NamedTuple):
    """What a sentence should not have, and what to write instead."""

    name: str
    pattern: re.Pattern[str]
    advice: str
    breaks: str  # an example


def _rule(name: str, pattern: str, advice: str, breaks: str) -> Rule:
    return Rule(name, re.compile(pattern), advice, breaks)


RULES = (
    _rule(
        "fragment",
        r"^Of (?!course\b)",
        "say what it is: 'Seed of the sampler', not 'Of the sampler'",
        "Of the sampler.",
    ),
    _rule(
        "headless",
        rf"^(?:What|Which|Whether|Whose|How|Where|When|Who) (?!(?:.*\b{VERB}\b){{2}})[^,;:?]*\.$",
        "give the sentence a verb: 'Return what ...', 'Tell whether ...'",
        "What a search found.",
    ),
    _rule(
        "is-no",
        r"(?i)(?<!there )\b(?:is|are|was|were) no (?!longer|more|less|worse|one|good|\w+er\b)\w",
        "write 'is not a ...'",
        "'x' is no id of a job.",
    ),
    _rule(
        "go",
        r"\b(?:weights?|shares?|that|which) (?:goes|go|went)\b(?=[.,;:]|$)",
        "weights are removed or pruned",
        "The share of the weights that go.",
    ),
    _rule(
        "without",
        r"\bwithout(?=[.;:)]|$)",
        "name what is missing, or write 'without it'",
        "Gemma falls apart without.",
    ),
    _rule(
        "some-time",
        r"\bsome (?:milliseconds|seconds|minutes|hours|days|thousandths|tenths)\b",
        "write 'a few minutes'",
        "It takes some minutes.",
    ),
    _rule(
        "dangling-not",
        r"\b(?:has|have|had|knows?|needs?) not(?=[.;:]|$)",
        "finish the clause: 'that JSON cannot represent'",
        "It holds what JSON has not.",
    ),
    _rule(
        "dangling-else",
        r"(?<!thing )(?<!body )(?<!all )(?<!where )\belse(?=\.$|$)|[:;,] else (?!if)",
        "write 'otherwise'",
        "Use it, else the default.",
    ),
    _rule(
        "twice",
        r"(?i)\b(?!CODE\b|pattern\b|in\b)([a-z]{2,}) \1\b",
        "one of the two words is enough",
        "The the model.",
    ),
    _rule("any-more", r"\bany more(?=[.,;:]|$)", "write 'no longer'", "It opens nothing any more."),
    _rule(
        "archaic",
        r"(?i)\b(?:dearer|dearest|in silence|shall|lest|whence|hence|therein|thereof|amiss|ere|"
        r"tells? of|for want of|as yet|anew)\b",
        "use a plain modern word",
        "The dearest step.",
    ),
)
