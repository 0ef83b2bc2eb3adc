"""Captions that tokenizers stumble over: scripts, cases, digits, emoji, spaces, entities, quotes, long, empty.

With some hundred random mixtures of them, always the same. `--verify` and tests/parity compare their ids.
"""

import random


CHOSEN = [
    *("", "a red fox", "A RED FOX", "  leading and  double   spaces\t\n newline ", "mixedCASE123abc"),
    *("it's the cat's, they've we'll I'd I'm don't", "'", "''s", "'S 'LL", "...", "!", "!!", "a ! b"),
    *("hello!!! ???", "12345 3.14 1,000,000 2nd", "² ½ ① Ⅷ ٣ 三", "e=mc^2 + ∑∫√ ≈ ≠ → ←"),
    *("\\n \\t %s {x} [y] (z) `q` ~ | _ under_score", "“curly” ‘quotes’ „low“ ‚x’ ʼ", "ﬁne ﬂour ﬀ ﬃ ﬅ ĳ Ǆ ŉ"),
    *("ｆｕｌｌｗｉｄｔｈ\u3000ＡＢＣ１２３ ｶﾀｶﾅ", "#tag @user http://x.y/z?a=b&c=d"),
    *("café cafe\u0301 naïve Ångström Å", "á\u0308̂ stacked", "ΟΔΟΣ ΣΊΣΥΦΟΣ Σ", "İstanbul ISTANBUL ß ẞ ſ"),
    *("𝕬𝖇𝖈 𝟙𝟚 ℌ", "красная лиса на траве", "Красная ЛИСА, ёж и Ёлка", "一只红色的狐狸 在草地上"),
    *("きつね カタカナ", "여우 한국어", "🦊 fox 🐱\u200d👤 👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f"),
    *("a&amp;b &lt;tag&gt; &quot;q&quot; &#39;x&#39; &nbsp; x", "a &amp;amp; b"),
    *("zero\u200bwidth soft\xadhyphen nbsp\xa0x", "bell\x07tab\tvt\x0bff\x0cend\x7f", "\ufeffbom"),
    *("a\r\nb\u2028c\x85d", "▁low line▁", "tab\u3000ideographic", "<|endoftext|>", "a <|startoftext|> b"),
    *("[PAD] [UNK] <PAD> <BOS>", "word " * 80, "supercalifragilisticexpialidocious" * 5, "a" * 25, "ab" * 40),
    *("emoji of hedgehog, glossy 3d style",),
]
ALPHABETS = [
    *("abcdefghij '.!?ABC123", "абвгдеё АБВ.,!", "fox the red and &;<>\"'", "αβγδεςσΣΑ ", "日本語漢字かな "),
    *("🦊🐱❤️\u200d ", "áéíóúñçÅ\u0301\u0308 "),
]


def make_captions(num_random: int = 300) -> list[str]:
    """The chosen ones and `num_random` mixtures."""
    numbers = random.Random(0)
    mixtures = [numbers.choice(ALPHABETS) + numbers.choice(ALPHABETS) for _ in range(num_random)]
    return CHOSEN + ["".join(numbers.choices(letters, k=numbers.randint(1, 40))) for letters in mixtures]
