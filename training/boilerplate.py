"""Phrases that captions of the web carry and that say nothing of the picture: the list, with examples.

`filter_captions.py` drops a caption of which too little is left without them. The paper (section 2.3) does so where a
caption is mainly boilerplate such as "photographed on <date>", in the forms of dates that its data had.
"""

import re
from typing import NamedTuple


_DAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|satur|sat|sun)(?:day)?\.?,?\s+"
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_NUMBER, _YEAR = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:1[6-9]|20)\d{2}"
_TIME = r"(?:,?\s+(?:at\s+)?\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:\s*[ap]\.?m\.?)?)"
# The forms: 12 May 2010 | May 12th, 2010 | May 2010 | 2010-05-12 | 12.05.2010 | 5/12/10 | 20100512 | 2010
DATE = (
    rf"(?:(?:{_DAY})?(?:the\s+)?{_NUMBER}\s+(?:of\s+)?{_MONTH},?\s+{_YEAR}"
    rf"|(?:{_DAY})?{_MONTH}\s+{_NUMBER},?\s+{_YEAR}"
    rf"|{_MONTH},?\s+{_YEAR}"
    rf"|{_YEAR}[-/.:]\d{{1,2}}[-/.:]\d{{1,2}}"
    rf"|\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:{_YEAR}|\d{{2}})"
    rf"|{_YEAR}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])"
    rf"|{_YEAR}){_TIME}?(?![\w/-])"
)
_PICTURE = r"(?:photo(?:graph)?|image|picture|pic|img|file|scan|screenshot)s?"
_MADE = r"(?:photographed|taken|shot|captured|scanned|uploaded|posted|published|created|added|recorded|updated)"
_NO_NAME = r"the|an?|my|our|his|her|its|their|night|day|hand|candlelight|moonlight"
_CAMERA = r"(?:canon|nikon|sony|olympus|panasonic|pentax|fuji(?:film)?|leica|kodak|samsung|iphone|lumix|hasselblad)"


class Phrase(NamedTuple):
    """A pattern, one caption that is nothing without it, and one that has it, or nearly, and says enough."""

    name: str
    pattern: str
    dropped: str
    kept: str


PHRASES = (
    Phrase(
        "made on a date",
        rf"(?:(?:this|the)\s+)?(?:{_PICTURE}\s+)?(?:(?:was|were|is)\s+)?{_MADE}\s+(?:on\s+|in\s+|at\s+)?{DATE}",
        "Photographed on 12 May 2010",
        "a red fox in the snow, photographed on 12 May 2010",
    ),
    Phrase(
        "made with a camera",
        rf"(?:{_PICTURE}\s+)?(?:{_MADE}\s+)?(?:with|using|by)\s+(?:an?\s+|the\s+|my\s+)?{_CAMERA}(?:\s+[\w-]*\d[\w-]*)*",
        "Photo taken with a Canon EOS-5D",
        "a woman with a camera takes a photo of a canon at the fort",
    ),
    Phrase(
        "file name",
        r"\b(?:img|image|dsc[nf]?|dscf?|pict?|photo|p|mvi|sam|scan|screenshot)[-_ ]?\d{3,}(?:[-_.]\w+)*"
        r"|\b[\w-]{1,80}\.(?:jpe?g|png|gif|webp|tiff?|bmp)\b",
        "DSC_0123.JPG",
        "the number 123 painted on a brick wall",
    ),
    Phrase(
        "number in a row",
        rf"\b(?:{_PICTURE}|page|slide|figure|fig\.?)\s*(?:no\.?|nr\.?|#)?\s*\d+(?:\s*(?:of|/)\s*\d+)?\b",
        "Photo 3 of 12",
        "two of three kittens sleep in a basket",
    ),
    Phrase(
        "rights",
        r"(?:©|\(c\)|\bcopyright\b)[^.|]*|\ball rights reserved\b"
        r"|\b(?:creative commons|cc[ -]by(?:[ -](?:sa|nc|nd))*)\b",
        "© 2010 John Smith Photography. All rights reserved.",
        "a man holds a protest sign with the letter c in a circle",
    ),
    Phrase(
        "credit",
        rf"\b{_PICTURE}\s*(?:credits?|courtesy(?:\s+of)?|via|source|by(?!\s+(?:{_NO_NAME})\b))\s*:?\s+[^.|]*"
        r"|\bcourtesy\s+of\s+[^.|]*",
        "Photo by John Smith / Example Agency",
        "a photo by the sea at night",
    ),
    Phrase(
        "stock",
        r"\b(?:royalty[- ]free|stock)\s+(?:(?:photo(?:graph|graphy)?|image|picture|footage|vector|illustration)s?\b)?"
        r"|\b(?:stock|royalty[- ]free)$",
        "Royalty-free stock photography",
        "the stock exchange building lit up at night",
    ),
    Phrase(
        "invitation",
        rf"\bclick\s+(?:here|(?:on\s+)?(?:the\s+|this\s+)?(?:{_PICTURE}\b|to|for))[^.|]*"
        r"|\b(?:view|see|open)\s+(?:full[- ]?size|large[r]?|original)\b[^.|]*",
        "Click here to enlarge the picture",
        "a girl clicks the shutter of her old camera",
    ),
    Phrase(
        "no description",
        rf"\b(?:no\s+(?:description|caption|title|alt(?:ernative)?\s+text)(?:\s+(?:available|provided|given))?|untitled"
        rf"|{_PICTURE}\s+may\s+contain|{_PICTURE}\s+not\s+(?:available|found))\b:?",
        "No description available.",
        "a shop window with no title above the door",
    ),
    Phrase(
        "address",
        r"\b(?:https?://|www\.)\S+|\b[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}",
        "https://www.example.com/pictures/12",
        "a billboard for www.example.com above the highway",
    ),
    Phrase(
        "date",
        rf"(?<![\w/-])(?:circa\s+|ca?\.\s*|dated?:?\s+|on\s+|in\s+)?{DATE}",
        "Saturday, May 12th, 2010 14:05",
        "an old map of the city drawn in 1850",
    ),
)  # fmt: skip

_COMPILED = [(phrase.name, re.compile(phrase.pattern, re.IGNORECASE)) for phrase in PHRASES]


def remove_boilerplate(caption: str) -> tuple[str, str | None]:
    """What is left of a caption without the phrases, and the name of the first of them that it had."""
    first = None
    for name, pattern in _COMPILED:
        left = pattern.sub(" ", caption)
        first = first or (name if left != caption else None)
        caption = left
    return caption, first
