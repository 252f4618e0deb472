"""Forty documents that break or attack what shows text: every widget must show them as they are."""

from __future__ import annotations

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
HEART_ON_FIRE = "\u2764\ufe0f\u200d\U0001f525"
FLAG_OF_SCOTLAND = "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in "gbsct") + "\U000e007f"

HOSTILE: tuple[tuple[str, str], ...] = (
    ("script", "before <script>window.hacked = 1</script> after"),
    ("end of script", "</script><script>window.hacked = 1</script>"),
    ("end of script in capitals", "</SCRIPT ><SCRIPT>window.hacked = 1</SCRIPT>"),
    ("image with a handler", "<img src=x onerror='window.hacked = 1'>"),
    ("svg with a handler", "<svg onload=window.hacked=1><animate onbegin=window.hacked=1 attributeName=x dur=1s>"),
    ("link", '<a href="javascript:window.hacked=1" autofocus onfocus=window.hacked=1>press</a>'),
    ("frame", '<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe>'),
    ("style", "</style><style>* { display: none !important }</style>"),
    ("comment", "<!-- <script> --> --!> <![CDATA[ ]]> <?php ?>"),
    ("end of quotes", "\"'`;window.hacked=1;//\\\"\\'\\`"),
    ("templates", "${window.hacked = 1} {{window.hacked = 1}} #{1} %DATA% %SCRIPT% %s %n %(x)s {0} {text}"),
    ("entities", "&lt;script&gt; &#60;b&#62; &amp;amp; &nbsp; &nosuch; &#0; &#x110000;"),
    ("markdown and mathematics", "[x](javascript:window.hacked=1) ![](x) $\\href{javascript:1}{x}$ $$\\frac{1}{0}$$ <b>"),
    ("names of objects", "__proto__ constructor toString hasOwnProperty undefined null NaN true -0 1e999"),
    ("right to left", "English, then שלום עולם and مرحبا بالعالم, then (parentheses) 123 again."),
    ("right to left only", "السلام عليكم ورحمة الله وبركاته\nשורה שנייה"),
    ("turned direction", "access \u202e\u2066level\u2069 \u2066user\u2069 and \u202ddone\u202c \u200eleft\u200f right"),
    ("no width", "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\u180eh"),
    ("only what has no width", "\u200b\u200c\u200d\u2060\ufeff" * 20),
    ("combining marks", "e\u0301 a\u0308\u0323 \u0301 starts with one; \u0915\u094d\u0937\u093f \u1112\u1161\u11ab"),
    ("a tower of marks", "Z" + "\u0300\u0323\u0489\u033f\u0360" * 200 + "algo"),
    ("a mark first", "\u0301\u0301\u0301"),
    ("joined emoji", f"{FAMILY} {HEART_ON_FIRE} {FLAG_OF_SCOTLAND} \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea 1\ufe0f\u20e3"),
    ("broken emoji", "\u200d\U0001f469\u200d \U0001f3fd \ufe0f \U0001f1e9 \U000e0067 \u20e3"),
    ("terminal colours", "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J\x1b[H \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\"),
    ("every control character", "".join(map(chr, [*range(32), *range(127, 160)]))),
    ("zero", "before\x00after\x00\x00"),
    ("only zeros", "\x00" * 500),
    ("lone surrogates", "high \ud800 low \udc00 turned \udc00\ud800 last \udbff"),
    ("a pair of two surrogates", "\ud83d\ude42 and \ud83d"),
    ("noncharacters and private ones", "\ufffe\uffff \U0010ffff \U0001fffe \ue000 \U000f0000 \ufffd \ufff9x\ufffay\ufffb"),
    ("empty", ""),
    ("one space", " "),
    ("only line ends", "\n" * 3000),
    ("all kinds of line ends", "crlf\r\ncr\rlf\nvt\vff\fnel\x85ls\u2028ps\u2029end\r\n\r\n\r"),
    ("all kinds of spaces", "\t\ttab\u00a0nbsp\u2003em\u2009thin\u3000wide\u1680ogham \u2800braille   end   \t"),
    ("one line of letters", "x" * 100_000),
    ("one line of wide letters", "\u6f22\u5b57\U0001f600" * 33_334),
    ("one line of words", "lorem ipsum " * 8_334),
    ("letters beyond sixteen bits", "\U0001d54f\U0001d550 \U00020000\U0002a6d6 \U00013000 \U0001f600" * 50),
)  # fmt: skip
